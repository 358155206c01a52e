"""The Hub for tests, asked by the real client: what a test of pushing stands on."""

import re

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import ENDPOINT, TOKEN, USER

REPO = f"{USER}/thing"
LARGE = bytes(range(256)) * 4096

# The client's own, on every LFS upload.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def api(hub):
    return HfApi(endpoint=ENDPOINT, token=TOKEN)


@pytest.fixture
def folder(tmp_path):
    """A folder to push: a text, a binary file below a folder, weights."""
    (tmp_path / "push" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "push" / "README.md").write_text(
        "---\ntags: [smoot]\npipeline_tag: image-classification\n---\n# Grün\n"
    )
    (tmp_path / "push" / "deep" / "er" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "push" / "model.safetensors").write_bytes(LARGE)
    return tmp_path / "push"


def test_what_was_pushed_comes_back(api, hub, folder, tmp_path):
    """Fault: a Hub that keeps names and loses bytes, or that lists what is not there."""
    assert api.whoami()["name"] == USER
    assert api.create_repo("thing").repo_id == REPO
    first = api.model_info(REPO).sha
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="all of it")
    info = api.model_info(REPO)
    assert info.sha == commit.oid != first
    assert (info.tags, info.pipeline_tag) == (["smoot"], "image-classification")
    names = {"README.md", "deep/er/picture.png", "model.safetensors"}
    assert set(api.list_repo_files(REPO)) == names | {".gitattributes"}
    assert api.list_repo_files(REPO, revision=first) == [".gitattributes"]
    # Binary content goes through LFS, text through the commit.
    sizes = {
        entry.path: entry.lfs and entry.lfs.size
        for entry in api.list_repo_tree(REPO, recursive=True)
        if hasattr(entry, "lfs")
    }
    assert sizes == {
        ".gitattributes": None,
        "README.md": None,
        "deep/er/picture.png": 6,
        "model.safetensors": len(LARGE),
    }
    assert [entry.path for entry in api.list_repo_tree(REPO, path_in_repo="deep")] == ["deep/er"]
    assert [entry.path for entry in api.get_paths_info(REPO, ["README.md"])] == ["README.md"]
    copy = tmp_path / "copy"
    snapshot_download(REPO, local_dir=copy, endpoint=ENDPOINT)
    for name in names:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    assert hub.unknown == []


def test_the_same_content_is_sent_once(api, hub, folder):
    """Fault: a test that believes an upload took place where the Hub had the content already."""
    api.create_repo("thing")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    head = hub.repository("models", REPO).head
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.repository("models", REPO).head == head
    assert hub.count("PUT", "^/lfs/") == 2
    api.delete_folder("deep", repo_id=REPO)
    assert "deep/er/picture.png" not in api.list_repo_files(REPO)


def test_what_is_not_there_has_the_hubs_own_error(api, hub, folder, tmp_path):
    """Fault: one 404 for repository, revision and file, which the client tells apart by a header."""
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO)
    api.create_repo("thing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="a" * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "config.json", cache_dir=tmp_path, endpoint=ENDPOINT)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, path_in_repo="nowhere"))
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=ENDPOINT, token="hf_wrong").whoami()
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("someone-else/thing")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("thing")
    assert api.create_repo("thing", exist_ok=True).repo_id == REPO
    (folder / "README.md").write_text("---\nmodel-index: [{name: x, results: [{task: {}, metrics: []}]}]\n---\n")
    with pytest.raises(ValueError, match=re.escape("Invalid metadata in README.md")):
        api.upload_folder(repo_id=REPO, folder_path=folder)


def test_a_download_cut_off_goes_on_where_it_stopped(api, hub, folder, tmp_path):
    """Fault: a range that is ignored, so that a resumed download has the beginning twice."""
    api.create_repo("thing")
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hub.drop("GET", "^/lfs/", after=300_000)
    path = hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path, endpoint=ENDPOINT)
    with open(path, "rb") as file:
        assert file.read() == LARGE
    assert hub.count("GET", "^/lfs/") == 2
