from forwardgrad.lab.execution.executing import execute as execute
from forwardgrad.lab.execution.executing import ready as ready
from forwardgrad.lab.execution.place import ExecutorName as ExecutorName
from forwardgrad.lab.execution.place import Place as Place
