from forwardgrad.lab.tuning.buildable import check_buildable as check_buildable
from forwardgrad.lab.tuning.campaign import Campaign as Campaign
from forwardgrad.lab.tuning.campaign import run_study as run_study
from forwardgrad.lab.tuning.cost import cost_table as cost_table
from forwardgrad.lab.tuning.cost import costs as costs
from forwardgrad.lab.tuning.cost import measure_pace as measure_pace
from forwardgrad.lab.tuning.planner import Planner as Planner
