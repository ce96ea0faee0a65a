from forwardgrad.lab.execution.dispatch import execute as execute
from forwardgrad.lab.execution.place import ExecutorName as ExecutorName
from forwardgrad.lab.execution.place import Place as Place
from forwardgrad.lab.execution.workers import ready as ready
