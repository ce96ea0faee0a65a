from forwardgrad.testing.cases import CASES as CASES
from forwardgrad.testing.cases import Case as Case
from forwardgrad.testing.cases import Loss as Loss
from forwardgrad.testing.checking import EstimatorCheck as EstimatorCheck
from forwardgrad.testing.checking import Result as Result
from forwardgrad.testing.checking import check_estimator as check_estimator
from forwardgrad.testing.checking import estimator_checks as estimator_checks
