import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_accelerate_state():
    """Accelerate keeps precision and device of a process's first Accelerator; every test starts without one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
