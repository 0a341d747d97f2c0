"""`python -m training {sft,reward,dpo,ema}`."""

from contracts.records import CHECKPOINT
from contracts.stage import Command, main
from training.config import DpoConfig, EmaConfig, RewardConfig, SftConfig
from training.launch import die_with_launcher, leaves_without_teardown

LAUNCH = "training.launch:launch"
COMMANDS = {
    "sft": Command(SftConfig, CHECKPOINT, "training.sft:run", LAUNCH),
    "reward": Command(RewardConfig, CHECKPOINT, "training.reward:run", LAUNCH),
    "dpo": Command(DpoConfig, CHECKPOINT, "training.dpo:run", LAUNCH),
    "ema": Command(EmaConfig, CHECKPOINT, "training.ema:run"),
}

if __name__ == "__main__":
    die_with_launcher()
    with leaves_without_teardown():
        main(COMMANDS, "training")
