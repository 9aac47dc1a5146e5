"""The JobSet files: valid by the models of their API, and each exit code of train.py answered as it should be."""

import copy
import json
import pathlib
import re
from typing import Any

import pytest
import yaml
from fake_programs import LAUNCH, FakePrograms, refused

from gpt2_jax.cli.train import main

FILES = ("jobset_tpu.yaml", "jobset_gpu.yaml")
ANSWERS = {
    75: "RestartJobSetAndIgnoreMaxRestarts",
    143: "RestartJobSetAndIgnoreMaxRestarts",
    "disrupted": "RestartJobSetAndIgnoreMaxRestarts",
    2: "FailJobSet",
    3: "FailJobSet",
    4: "FailJobSet",
    1: "RestartJobSet",
    134: "RestartJobSet",
    137: "RestartJobSet",
}


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / name).read_text())


def workers(jobset: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specification of the Job, and its container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, container


@pytest.mark.parametrize("name", FILES)
def test_valid_by_the_models_of_the_api(name: str) -> None:
    reason = "the models are not here: pip install kubeflow-trainer-api"
    models = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason=reason)
    jobset = loaded(name)

    def back(source: dict[str, Any]) -> dict[str, Any]:
        return json.loads(models.JobsetV1alpha2JobSet.from_dict(source).to_json())

    # What the models do not know they drop, so that a slip would be missing.
    assert back(jobset) == jobset
    slip = copy.deepcopy(jobset)
    workers(slip)[0]["backofLimit"] = 0
    assert back(slip) != slip
    workers(slip)[0]["backoffLimit"] = "none"
    with pytest.raises(ValueError, match="backoffLimit"):
        back(slip)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("end", ANSWERS)
def test_how_a_pod_ended_decides_what_comes(name: str, end: int | str) -> None:
    assert answer(loaded(name), end) == ANSWERS[end]


def answer(jobset: dict[str, Any], end: int | str) -> str:
    """What the controllers do, as they are documented: the first rule that fits, by the Job's reason and message."""
    job, container = workers(jobset)
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if (
            codes
            and codes["containerName"] == container["name"]
            and codes["operator"] == "In"
            and end in codes["values"]
        ):
            how = f"Container {container['name']} for pod default/run-workers-0-1-x2v9k failed with exit code {end}"
        elif conditions == [{"type": "DisruptionTarget", "status": "True"}] and end == "disrupted":
            how = "Pod default/run-workers-0-1-x2v9k has condition DisruptionTarget"
        else:
            continue
        reason, message = "PodFailurePolicy", f"{how} matching {rule['action']} rule at index {index}"
        break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if reason in (reasons or [reason]) and any(re.search(pattern, message) for pattern in patterns or [""]):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("name", FILES)
def test_the_processes_are_as_many_as_the_pods_and_told_so(name: str) -> None:
    job, container = workers(loaded(name))
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    if name == "jobset_gpu.yaml":  # GKE tells JAX the hosts of a TPU slice
        assert f"--num_processes={job['completions']}" in container["args"]
        assert "--process_id=$(JOB_COMPLETION_INDEX)" in container["args"]
        # JobSet's name for the first pod: JOBSET-REPLICATED-JOB-POD.JOBSET.
        assert "--coordinator_address=$(RUN_NAME)-workers-0-0.$(RUN_NAME):8476" in container["args"]


@pytest.mark.parametrize("name", FILES)
def test_train_py_knows_its_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, container = workers(loaded(name))
    assert container["command"] == ["python", "train.py"]
    values = {"RUN_NAME": "run", "JOB_COMPLETION_INDEX": "1"}
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in container["args"]]
    arguments[0] = arguments[0].replace("configs/", f"{LAUNCH.parent / 'configs'}/")
    assert main([*arguments, "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_jobset_sh_gives_the_run_its_name(tmp_path: pathlib.Path, name: str) -> None:
    programs = FakePrograms(tmp_path)
    programs.add("kubectl", "cat > made.yaml")
    done = programs.bash(LAUNCH / "jobset.sh", "run-7", LAUNCH / name, "--namespace=teams own")
    assert (done.returncode, done.stderr) == (0, "")
    assert programs.calls() == [["kubectl", "create", "-f", "-", "--namespace=teams own"]]
    expected = loaded(name)
    expected["metadata"]["name"] = "run-7"
    assert yaml.safe_load((tmp_path / "made.yaml").read_text()) == expected


def test_jobset_sh_refuses_a_file_without_a_place_for_the_name(tmp_path: pathlib.Path) -> None:
    programs = FakePrograms(tmp_path)
    programs.add("kubectl")
    refused(programs.bash(LAUNCH / "jobset.sh", "run-7", LAUNCH / "skypilot.yaml"), "RUN-NAME")
    assert programs.calls() == []
