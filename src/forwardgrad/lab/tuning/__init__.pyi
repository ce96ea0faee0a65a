from forwardgrad.lab.tuning.campaign import Campaign as Campaign
from forwardgrad.lab.tuning.cost import costs as costs
from forwardgrad.lab.tuning.cost import measure as measure
from forwardgrad.lab.tuning.cost import table as table
from forwardgrad.lab.tuning.examination import examine as examine
from forwardgrad.lab.tuning.planner import Planner as Planner
