from forwardgrad.lab.report.document import write as write
from forwardgrad.lab.report.packing import pack_thin as pack_thin
