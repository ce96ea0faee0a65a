from forwardgrad.lab.data.datasets import Dataset as Dataset
from forwardgrad.lab.data.datasets import Split as Split
from forwardgrad.lab.data.datasets import divide as divide
from forwardgrad.lab.data.datasets import folder as folder
from forwardgrad.lab.data.datasets import load as load
from forwardgrad.lab.data.datasets import verify as verify
from forwardgrad.lab.data.fetching import fetch as fetch
