from forwardgrad.lab.finetuning.asked import FineTuning as FineTuning
from forwardgrad.lab.finetuning.asked import OptimizerKind as OptimizerKind
from forwardgrad.lab.finetuning.asked import RateSchedule as RateSchedule
from forwardgrad.lab.finetuning.asked import StoredPrecision as StoredPrecision
from forwardgrad.lab.finetuning.asked import Task as Task
from forwardgrad.lab.finetuning.begin import finetune as finetune
