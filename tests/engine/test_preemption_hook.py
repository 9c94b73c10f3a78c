import multiprocessing
import os
import signal
import time

import pytest

from mmslak.engine import PreemptionHook


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_forked_processes_can_be_ended(number):
    """mmdet's VOC metric ends its pool by SIGTERM and waits for it."""
    hook = PreemptionHook()
    hook.before_train(None)
    try:
        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.2)
        os.kill(child.pid, number)
        child.join(10)
        ended = child.exitcode is not None
        child.kill()
    finally:
        hook.after_train(None)
    assert ended
    assert signal.getsignal(signal.SIGTERM) is not hook._note
