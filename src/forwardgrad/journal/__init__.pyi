from forwardgrad.journal.digests import digest_of as digest_of
from forwardgrad.journal.reading import Journal as Journal
from forwardgrad.journal.reading import LoggedStep as LoggedStep
from forwardgrad.journal.reading import read_journal as read_journal
from forwardgrad.journal.records import JournalError as JournalError
from forwardgrad.journal.writing import StepLog as StepLog
