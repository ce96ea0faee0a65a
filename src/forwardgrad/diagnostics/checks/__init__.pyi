from forwardgrad.diagnostics.checks.checking import check as check
from forwardgrad.diagnostics.checks.findings import Check as Check
from forwardgrad.diagnostics.checks.findings import Finding as Finding
