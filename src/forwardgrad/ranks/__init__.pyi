from forwardgrad.ranks.distributed import Distributed as Distributed
from forwardgrad.ranks.meeting import join_ranks as join_ranks
from forwardgrad.ranks.together import ALONE as ALONE
from forwardgrad.ranks.together import Apart as Apart
from forwardgrad.ranks.together import Ranks as Ranks
from forwardgrad.ranks.together import share_of as share_of
from forwardgrad.ranks.wire import RankGone as RankGone
from forwardgrad.ranks.wire import hold as hold
