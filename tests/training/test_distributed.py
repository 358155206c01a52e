"""Any number of processes, on one machine or several, gives what one process gives with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyImages, largest_difference, mean_difference, parameters
from distributed_run import GLOBAL_BATCH, RUNS

HERE = Path(__file__).parents[1]
# Without dropout and batch statistics, which are of each rank's own share of the batch, the runs are the same but for
# the order in which float32 sums are taken: measured 4e-7 (largest) and 8e-10 (mean) at most.
EXACT = [
    *("vit", "uneven", "few", "accumulated", "uneven_accumulated", "few_accumulated"),
    *("eval_pass", "loss_pass", "sgt", "stream", "augmented", "frozen_batchnorm"),
    *("share", "share_accumulated", "share_loss_pass", "soft_labels", "several_labels"),
    *("sharded", "sharded_few", "sharded_accumulated", "sharded_sgt", "sharded_share", "sharded_stream"),
]
LARGEST, MEAN = 1e-5, 1e-6
SEVERAL = [2, 4]


def start(launcher, folder, *arguments):
    """A launcher of `distributed_run.py`, in interpreters of its own."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, *launcher, str(HERE / "distributed_run.py"), str(folder), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def results_of(launchers, folder, ranks):
    """Wait for the launchers; the results of every rank."""
    said = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(s[-3000:] for s in said)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of 1, 2 and 4 processes: a list with the results of every rank, each by the name of the run."""
    folder = tmp_path_factory.mktemp("distributed")
    saved, found = folder / "1" / "vit" / "checkpoint-4", {"folder": folder}
    # A sharded K goes from one process, which has all of it, to four, and from four to two.
    for processes, others in ((1, None), (4, saved), (2, folder / "4" / "sharded" / "checkpoint-4")):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        more = [saved, "", others] if processes > 1 else []
        started = start(launcher if processes > 1 else [], folder / str(processes), *more)
        found[processes] = results_of([started], folder / str(processes), processes)
    return found


def require_one_training(ranks, name):
    """All ranks are of one training, with the same weights at its end and the same K at the end of every step."""
    for rank in ranks:
        assert rank[name]["world_size"] == len(ranks)
        assert largest_difference(ranks[0][name]["parameters"], rank[name]["parameters"]) == 0
        assert len(rank[name]["k"]) == len(ranks[0][name]["k"])
        assert all(torch.equal(one, two) for one, two in zip(ranks[0][name]["k"], rank[name]["k"], strict=True))


def require_the_same(alone, together, label):
    """K is equal in every entry at every step, weights but for rounding."""
    for one, two in zip(alone["k"][-len(together["k"]) :], together["k"], strict=True):
        assert torch.equal(one, two)
    largest, mean = (f(alone["parameters"], together["parameters"]) for f in (largest_difference, mean_difference))
    print(f"{label}: K equal in {len(one)} entries, weights off by {largest:.1e} at most, {mean:.1e} on average")  # noqa: T201 - the figures for the README, by `pytest -s`
    assert largest < LARGEST
    assert mean < MEAN


@pytest.mark.parametrize("name", [name for name in RUNS if name != "batchnorm_plain"])
@pytest.mark.parametrize("processes", SEVERAL)
def test_k_is_the_same_on_every_rank_at_every_steps_end(processes, name, results):
    """Catches K updated by one rank alone, and ranks that train models of their own (two forwards, buffers)."""
    require_one_training(results[processes], name)
    if "standard" not in name:
        k = results[processes][0][name]["k"]
        assert len(k) == 6
        assert "sgt" in name or len(k[-1].unique()) > 1


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("processes", SEVERAL)
def test_several_processes_equal_one(processes, name, results):
    """Catches fill, augmentation or saliency that depend on the rank, and a loss scaled by the number of processes."""
    require_the_same(results[1][0][name], results[processes][0][name], f"{processes} processes, {name}")


@pytest.mark.parametrize("processes", SEVERAL)
@pytest.mark.parametrize("name", ["vit", "share", "sharded"])
def test_logs_are_of_all_processes(name, processes, results):
    """Catches logs of the first rank's samples alone, and a mean over processes with unlike numbers of samples."""
    alone, together = (results[n][0][name]["logs"] for n in (1, processes))
    for one, two in zip(alone, together, strict=True):
        for name in {"ce_loss", "kl_loss", "delta", "k_up", "k_down", "k_median"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("name", ["uneven", "few", "sharded_few"])
@pytest.mark.parametrize("processes", SEVERAL)
def test_a_sample_that_stands_on_two_ranks_moves_once(processes, name, results):
    """Catches K moved again where the sampler repeats a sample to fill the last round, within a step or an epoch."""
    steps_per_epoch = -(-RUNS[name]["length"] // GLOBAL_BATCH)
    seen = [[row for rank in results[processes] for row in rank[name]["seen"][step]] for step in range(6)]
    k = [torch.full_like(results[1][0][name]["k"][0], 32), *results[processes][0][name]["k"]]
    repeated = 0
    for step, rows in enumerate(seen):
        assert len(rows) == GLOBAL_BATCH
        begin = step - step % steps_per_epoch
        before = {row for rows_before in seen[begin:step] for row in rows_before}
        again = [row for row in set(rows) if rows.count(row) > 1 or row in before]
        repeated += len(again)
        late = [row for row in set(rows) if row in before]
        assert torch.equal(k[step][late], k[step + 1][late])
        untouched = [row for row in range(RUNS[name]["length"]) if row not in rows]
        assert torch.equal(k[step][untouched], k[step + 1][untouched])
    assert repeated == 3 * 6 // steps_per_epoch


@pytest.mark.parametrize("processes", SEVERAL)
def test_batchnorm_trains_as_with_a_plain_trainer(processes, results):
    """Catches buffers that the second forward pass, or the masked images, bring out of step between the ranks."""
    plain, standard, without_kl = (
        results[processes][0][f"batchnorm_{kind}"] for kind in ("plain", "standard", "without_kl")
    )
    # The plain loss is divided in another order, and statistics of two images make much of that: measured 1.3e-4.
    for kind in ("parameters", "buffers"):
        one, two = ({name: value.double() for name, value in run[kind].items()} for run in (plain, standard))
        assert largest_difference(one, two) < 1e-3
        assert mean_difference(one, two) < MEAN
    assert largest_difference(standard["parameters"], without_kl["parameters"]) == 0
    assert all(torch.isfinite(b).all() for b in results[processes][0]["batchnorm"]["buffers"].values())


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_run_of_another_seed_is_kept_apart_on_every_rank(processes, results):
    """Catches a rank that begins where another refuses and waits for it forever, and an id of each rank's own."""
    said = [rank["other_seed"] for rank in results[processes]]
    assert all(one == said[0] for one in said)
    fresh, resumed, run_id = said[0]
    assert "of another run (run " in fresh
    assert "no whole checkpoint of this run" in resumed
    assert "its seed is 42, not 1" in resumed
    assert len(run_id) == 32


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_checkpoint_of_one_process_is_continued_by_several(processes, results):
    """Catches first visits or K of the main process alone, and ranks that take up different checkpoints."""
    require_one_training(results[processes], "resumed")
    assert len(results[processes][0]["resumed"]["k"]) == 2
    require_the_same(results[1][0]["vit"], results[processes][0]["resumed"], f"1 process, then {processes}")


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_checkpoint_of_another_number_of_processes_is_continued_with_a_sharded_k(processes, results):
    """Catches a range of K that is read at the place of the run that wrote it."""
    require_one_training(results[processes], "resumed_sharded")
    assert len(results[processes][0]["resumed_sharded"]["k"]) == 2
    require_the_same(results[1][0]["vit"], results[processes][0]["resumed_sharded"], f"sharded by {processes}")


@pytest.mark.parametrize("processes", SEVERAL)
def test_each_process_holds_its_share_of_k_and_reads_the_counts_alone(processes, results):
    """Catches K that is whole on every process all the same, and a log, card or tracker that waits for the others."""
    for name in ("sharded", "sharded_few"):
        held = [rank[name]["held"] for rank in results[processes]]
        length = RUNS[name].get("length", 24)
        assert sum(held) == length
        assert max(held) == -(-length // processes)
        alone, k = results[processes][-1][name]["alone"], results[1][0][name]["k"][-1]
        assert alone["statistics"]["k_median"] == k.double().quantile(0.5)
        assert sum(alone["counts"]) == length
        assert "call mask_budget.gathered() on every process" in alone["said"]


@pytest.mark.parametrize("name", ["vit", "sharded"])
def test_a_checkpoint_of_two_processes_is_continued_by_one(name, results, quick_trainer):
    """Catches a K that only ranks can read."""
    trainer = quick_trainer(train_dataset=TinyImages(24), step_size=3000, optim="sgd")
    trainer.train(resume_from_checkpoint=str(results["folder"] / "2" / name / "checkpoint-4"))
    alone = results[1][0]["vit"]
    assert torch.equal(alone["k"][-1], trainer.mask_budget.k)
    assert largest_difference(alone["parameters"], parameters(trainer)) < LARGEST


@pytest.mark.parametrize("processes", SEVERAL)
def test_processes_that_find_another_k_are_refused(processes, results):
    """Catches a machine whose copy of the checkpoint lacks K: it would go on with masks and a K of its own."""
    for rank in results[processes]:
        for said in rank["lost_budget"]:
            assert "do not find the same K" in said


@pytest.mark.parametrize("processes", SEVERAL)
def test_fsdp_that_shards_nothing_is_refused_by_name(processes, results):
    """Catches DDP where the user has asked for FSDP: accelerate makes it so on CPUs, and says nothing."""
    assert {rank["fsdp"].split(":")[0] for rank in results[processes]} == {
        "fsdp is set, but accelerate runs MULTI_CPU here, which shards nothing"
    }


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_two_machines_are_two_launchers_with_one_rendezvous(launcher, results, tmp_path):
    """Catches a local rank that is taken for the rank: the first process of the second machine is no main process."""
    port, started = free_port(), []
    for machine in ("0", "1"):
        if launcher == "torchrun":
            how = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={machine}"]
            how += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        else:
            # --multi_gpu is accelerate's name for "through torchrun"; the device is the training's own affair.
            how = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=2", "--num_processes=2"]
            how += [f"--machine_rank={machine}", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
            how += ["--mixed_precision=no", "--dynamo_backend=no"]
        started.append(start(how, tmp_path / "run", "", "vit,uneven"))
    found = results_of(started, tmp_path / "run", 2)
    for name in ("vit", "uneven"):
        require_one_training(found, name)
        require_the_same(results[1][0][name], found[0][name], f"2 machines, {launcher}, {name}")
        assert largest_difference(results[2][0][name]["parameters"], found[0][name]["parameters"]) == 0
