from forwardgrad.engines.batch import Batch as Batch
from forwardgrad.engines.captured import Captured as Captured
from forwardgrad.engines.compiled import Compiled as Compiled
from forwardgrad.engines.eager import EagerStep as EagerStep
from forwardgrad.engines.graphs import Engine as Engine
from forwardgrad.engines.trace import tf32 as tf32
