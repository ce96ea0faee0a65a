from forwardgrad.optim.nesterov import Nesterov as Nesterov
from forwardgrad.optim.replayed import Replayed as Replayed
from forwardgrad.optim.replayed import ReplayedAdam as ReplayedAdam
from forwardgrad.optim.replayed import ReplayedSGD as ReplayedSGD
from forwardgrad.optim.step_cap import cap_step as cap_step
