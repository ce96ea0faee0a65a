from forwardgrad.optim.nesterov import Nesterov as Nesterov
from forwardgrad.optim.step_cap import cap_step as cap_step
