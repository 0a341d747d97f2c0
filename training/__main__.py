"""`python -m training {sft,reward,value-head,experience,policy,critic,merge,ema}`."""

import os
import sys

# Ours before anything in the working directory that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings

if __name__ == "__main__":
    surroundings.settle()

from contracts.records import CHECKPOINT, EXPERIENCE
from contracts.stage import Command, main
from training.config import (
    CriticConfig,
    EmaConfig,
    ExperienceConfig,
    MergeConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    ValueHeadConfig,
)
from training.launch import die_with_launcher, leaves_without_teardown

LAUNCH, HELPS = "training.launch:launch", "training.launch:helps"
COMMANDS = {
    "sft": Command(SftConfig, CHECKPOINT, "training.sft:run", LAUNCH, HELPS),
    "reward": Command(RewardConfig, CHECKPOINT, "training.reward:run", LAUNCH, HELPS),
    "value-head": Command(ValueHeadConfig, CHECKPOINT, "training.value_head:run"),
    "experience": Command(ExperienceConfig, EXPERIENCE, "training.experience:run"),
    "policy": Command(PolicyConfig, CHECKPOINT, "training.policy:run", LAUNCH, HELPS),
    "critic": Command(CriticConfig, CHECKPOINT, "training.critic:run", LAUNCH, HELPS),
    "merge": Command(MergeConfig, CHECKPOINT, "training.merge:run"),
    "ema": Command(EmaConfig, CHECKPOINT, "training.ema:run"),
}

if __name__ == "__main__":
    die_with_launcher()
    with leaves_without_teardown():
        main(COMMANDS, "training")
