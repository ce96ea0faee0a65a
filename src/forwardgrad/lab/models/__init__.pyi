from forwardgrad.lab.models.building import build as build
from forwardgrad.lab.models.starting import keep_start as keep_start
from forwardgrad.lab.models.starting import load_start as load_start
from forwardgrad.lab.models.tokens import LONGEST as LONGEST
from forwardgrad.lab.models.tokens import WORDS as WORDS
from forwardgrad.lab.models.writing import written as written
