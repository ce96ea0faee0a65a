from forwardgrad.lab.execution.dispatch import execute as execute
from forwardgrad.lab.execution.place import ExecutorName as ExecutorName
from forwardgrad.lab.execution.place import LostRank as LostRank
from forwardgrad.lab.execution.place import Place as Place
from forwardgrad.lab.execution.place import launched as launched
from forwardgrad.lab.execution.team import follow_first as follow_first
from forwardgrad.lab.execution.team import joined as joined
from forwardgrad.lab.execution.workers import ready as ready
