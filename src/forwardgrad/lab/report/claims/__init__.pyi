from forwardgrad.lab.report.claims import findings as findings
from forwardgrad.lab.report.claims import fine_tuning as fine_tuning
from forwardgrad.lab.report.claims import goals as goals
from forwardgrad.lab.report.claims import speed as speed
from forwardgrad.lab.report.claims import verdict as verdict
from forwardgrad.lab.report.claims.goals import MINUS as MINUS
from forwardgrad.lab.report.claims.goals import MODELS as MODELS
from forwardgrad.lab.report.claims.judged import claims_section as claims_section
