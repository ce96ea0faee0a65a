from forwardgrad.lab.models.building import build as build
from forwardgrad.lab.models.tokens import LONGEST as LONGEST
from forwardgrad.lab.models.tokens import WORDS as WORDS
