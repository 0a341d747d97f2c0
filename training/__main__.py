"""`python -m training {sft,reward,value-head,experience,policy,critic,ema}`."""

from contracts.records import CHECKPOINT, EXPERIENCE
from contracts.stage import Command, main
from training.config import (
    CriticConfig,
    EmaConfig,
    ExperienceConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    ValueHeadConfig,
)
from training.launch import die_with_launcher, leaves_without_teardown

LAUNCH = "training.launch:launch"
COMMANDS = {
    "sft": Command(SftConfig, CHECKPOINT, "training.sft:run", LAUNCH),
    "reward": Command(RewardConfig, CHECKPOINT, "training.reward:run", LAUNCH),
    "value-head": Command(ValueHeadConfig, CHECKPOINT, "training.value_head:run"),
    "experience": Command(ExperienceConfig, EXPERIENCE, "training.experience:run"),
    "policy": Command(PolicyConfig, CHECKPOINT, "training.policy:run", LAUNCH),
    "critic": Command(CriticConfig, CHECKPOINT, "training.critic:run", LAUNCH),
    "ema": Command(EmaConfig, CHECKPOINT, "training.ema:run"),
}

if __name__ == "__main__":
    die_with_launcher()
    with leaves_without_teardown():
        main(COMMANDS, "training")
