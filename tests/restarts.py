"""What the runs of tests/test_restarts.py train: the toy, in processes that die in iteration 5.

`DIES` in the environment of a launcher says which: 'worker' is rank 1 when it is started for the
first time, 'agent' are all processes of that launcher and torchrun itself.
"""

import os
import signal

from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, MODELS
from toy import Data, Toy

MODELS.register_module(name='RestartedToy', module=Toy)
DATASETS.register_module(name='RestartedData', module=Data)


@HOOKS.register_module()
class Dies(Hook):
    """SIGKILL in the middle of iteration 5."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        who = os.environ.get('DIES')
        if runner.iter + 1 != 5 or not who:
            return
        if who == 'agent':
            os.kill(os.getppid(), signal.SIGKILL)
        elif os.environ['RANK'] != '1' or os.environ['TORCHELASTIC_RESTART_COUNT'] != '0':
            return
        os.kill(os.getpid(), signal.SIGKILL)
