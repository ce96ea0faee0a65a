from forwardgrad.lab.report.document import write as write
from forwardgrad.lab.report.thinning import thinning_of as thinning_of
