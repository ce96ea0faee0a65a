from forwardgrad.lab.report.document import write as write
