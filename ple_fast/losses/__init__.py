"""The joint loss of the PLE paper (section 4.3, eq. 8-10): each task averaged over its own sample space.

A task's *sample space* is the set of samples that it learns from: those with a label, or what a mask says. ESMM's pair
over the entire space is a composition: :func:`entire_space` gives the logit of pCTCVR = pCTR * pCVR, for a binary task.
"""

from .balance import Balance, balance_loss
from .esmm import entire_space
from .joint_loss import JointLoss, JointLossResult
from .task_loss import MISSING_CLASS, TaskLoss

__all__ = ["MISSING_CLASS", "Balance", "JointLoss", "JointLossResult", "TaskLoss", "balance_loss", "entire_space"]
