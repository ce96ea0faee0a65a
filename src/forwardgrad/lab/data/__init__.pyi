from forwardgrad.lab.data.datasets import load as load
from forwardgrad.lab.data.fetching import fetch as fetch
from forwardgrad.lab.data.files import folder as folder
from forwardgrad.lab.data.files import verify as verify
from forwardgrad.lab.data.splits import Dataset as Dataset
from forwardgrad.lab.data.splits import Split as Split
from forwardgrad.lab.data.splits import divide as divide
