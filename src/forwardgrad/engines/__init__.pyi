from forwardgrad.engines.batch import Batch as Batch
from forwardgrad.engines.captured import Captured as Captured
from forwardgrad.engines.compiled import Compiled as Compiled
from forwardgrad.engines.graphs import Engine as Engine
from forwardgrad.engines.pieces import Pieces as Pieces
from forwardgrad.engines.trace import tf32 as tf32
