"""A small Hugging Face Hub on loopback, for huggingface_hub's real client: HF_ENDPOINT=Hub().url and HF_HUB_DISABLE_XET=1.

It speaks what the client asks when models are pushed and loaded: whoami, create, model info, branches, preupload, LFS batch, upload
and verify, commit (NDJSON), pull requests, resolve with ETags and a redirect to a storage host, collections. It is strict where the
real one is: tokens, private repositories, LFS objects that must be there, digests that must be right.

No package serves this: olah only mirrors downloads of the real Hub, KohakuHub wants PostgreSQL, lakeFS and an S3 store beside it.
What it does not speak is Xet, whose client is native code with a storage protocol of its own: with HF_HUB_DISABLE_XET the client
falls back to LFS, as it does on a machine without hf_xet.
"""
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = ('.safetensors', '.bin', '.png')
WHEN = '2026-11-20T12:00:00.000Z'


@dataclass
class Repo:
    """Branches and pull requests are refs, each a list of commits: (sha, path -> (oid, whether by LFS))."""
    private: bool
    refs: dict[str, list] = field(default_factory=lambda: {'main': [('0' * 40, {})]})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str):
        """(sha, files), or None."""
        commits = {sha: (sha, files) for ref in self.refs.values() for sha, files in ref}
        return self.refs[revision][-1] if revision in self.refs else commits.get(revision)


class Hub:
    """The server, with everything it holds; `with Hub() as hub`.

    Attributes:
        tokens: Token -> (user, whether it may write).
        repos: 'owner/name' -> repository.
        blobs: Digest -> content.
        collections: Slug -> what the Hub says of it.
        unknown: Requests that it does not know.
        cuts: So many LFS uploads are cut off half-way.
        uploads: Complete LFS uploads.
        leaked: Whether a token was sent to the storage host.
    """

    def __init__(self):
        self.tokens = {'hf_write': ('me', True), 'hf_read': ('me', False), 'hf_other': ('you', True)}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.unknown: list[str] = []
        self.cuts = self.uploads = 0
        self.leaked = False
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def start(self) -> None:
        """Listens, after `stop` on the same port."""
        handler = type('Handler', (_Handler,), {'hub': self})
        self.server = _Server(('127.0.0.1', self.port), handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from now on."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.server.connections:  # those kept alive, too
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> 'Hub':
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def files(self, repo: str, revision: str = 'main') -> dict[str, bytes]:
        """What a repository holds."""
        return {path: self.blobs[oid] for path, (oid, _) in self.repos[repo].at(revision)[1].items()}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args):
        self.connections = []
        super().__init__(*args)

    def process_request(self, request, address):
        self.connections.append(request)
        super().process_request(request, address)


class Refused(Exception):
    """status, X-Error-Code, X-Error-Message"""


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_any(self):
        self.url = urlsplit(self.path)
        self.where = unquote(self.url.path)  # revisions come quoted: refs%2Fpr%2F1
        try:
            for method, pattern, answer in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, self.where)):
                    return answer(self, *match.groups())
            self.hub.unknown.append(f'{self.command} {self.path}')
            raise Refused(404, None, 'not found')
        except Refused as e:
            status, code, message = e.args
            self.reply({'error': message}, status, **({'X-Error-Code': code} if code else {}), **{'X-Error-Message': message})

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def reply(self, body=b'', status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not hasattr(self, 'body') and self.command in ('POST', 'PUT'):
            self.read()  # else what was not read would be taken for the next request
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)
        self.__dict__.pop('body', None)

    def read(self) -> bytes:
        self.body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        return self.body

    def json(self):
        return json.loads(self.read())

    # -- rights --

    def user(self, write: bool = False):
        """Who asks: (name, whether it may write); (None, False) for nobody."""
        said = self.headers.get('Authorization')
        if said is None:
            if write:
                raise Refused(401, None, 'Invalid username or password.')
            return None, False
        found = self.hub.tokens.get(said.removeprefix('Bearer '))
        if found is None:
            raise Refused(401, None, 'Invalid credentials in Authorization header')
        return found

    def repo(self, name: str, write: bool = False) -> Repo:
        user, may_write = self.user(write)
        found = self.hub.repos.get(name)
        if found is None or found.private and user != name.partition('/')[0]:
            raise Refused(404 if user else 401, 'RepoNotFound', 'Repository not found')
        pull = write and 'create_pr' in parse_qs(self.url.query)
        if write and not (may_write and (pull or user == name.partition('/')[0])):
            raise Refused(403, None, 'Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request')
        return found

    def at(self, repo: Repo, revision: str):
        found = repo.at(revision)
        if found is None:
            raise Refused(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return found

    # -- repositories --

    def whoami(self):
        user, may_write = self.user(write=True)
        self.reply({'type': 'user', 'name': user, 'orgs': [], 'auth': {'accessToken': {'role': 'write' if may_write else 'read'}}})

    def create(self):
        user, may_write = self.user(write=True)
        said = self.json()
        owner = said.get('organization') or user
        name = f"{owner}/{said['name']}"
        if not may_write or owner != user:
            raise Refused(403, None, f"You don't have the rights to create a model under the namespace \"{owner}\"")
        with self.hub.lock:
            new = name not in self.hub.repos
            if new:
                self.hub.repos[name] = Repo(said.get('visibility') == 'private' or said.get('private') is True)
        self.reply({'url': f'{self.hub.url}/{name}', 'name': name}, 200 if new else 409)

    def info(self, name: str, revision: str = 'main'):
        repo = self.repo(name)
        sha, files = self.at(repo, revision or 'main')
        self.reply({'_id': name, 'id': name, 'modelId': name, 'sha': sha, 'private': repo.private, 'tags': [], 'downloads': 0, 'likes': 0,
                    'createdAt': WHEN, 'lastModified': WHEN, 'siblings': [{'rfilename': path} for path in files]})

    def branch(self, name: str, branch: str):
        repo = self.repo(name, write=True)
        if branch in repo.refs:
            raise Refused(409, None, 'Reference already exists')
        repo.refs[branch] = [self.at(repo, self.json().get('startingPoint') or 'main')]
        self.reply({}, 201)

    # -- uploads --

    def preupload(self, name: str, revision: str):
        repo = self.repo(name, write=True)
        _, files = self.at(repo, revision)
        self.reply({'files': [
            {'path': f['path'], 'uploadMode': 'lfs' if f['path'].endswith(LFS) else 'regular', 'shouldIgnore': False,
             'oid': oid if (oid := files.get(f['path'], (None, 0))[0]) is None or files[f['path']][1] else git_hash(self.hub.blobs[oid])}
            for f in self.json()['files']]})

    def batch(self, name: str):
        self.repo(name, write='ref' in (said := self.json()))  # no ref: for a pull request
        self.reply({'transfer': 'basic', 'objects': [
            {'oid': o['oid'], 'size': o['size'], **({} if o['oid'] in self.hub.blobs else {'actions': {
                'upload': {'href': f"{self.storage}/lfs/{o['oid']}"}, 'verify': {'href': f'{self.hub.url}/verify/{name}'}}})}
            for o in said['objects']]})

    @property
    def storage(self) -> str:
        return f'http://localhost:{self.hub.port}'  # another host than that of the Hub, so the client keeps its token from it

    def upload(self, oid: str):
        self.hub.leaked |= 'Authorization' in self.headers
        with self.hub.lock:
            cut = self.hub.cuts > 0
            self.hub.cuts -= cut
        if cut:
            self.rfile.read(int(self.headers['Content-Length']) // 2)
            self.close_connection = True
            return self.connection.close()
        data = self.read()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, None, 'wrong digest')
        self.hub.blobs[oid] = data
        self.hub.uploads += 1
        self.reply()

    def verify(self, name: str):
        said = self.json()
        if len(self.hub.blobs.get(said['oid'], b'')) != said['size']:
            raise Refused(404, None, 'no such object')
        self.reply({})

    def validate(self):
        content = self.json()['content']
        wrong = [] if content.startswith('---\n') else [{'message': 'no metadata'}]
        self.reply({'errors': wrong, 'warnings': []}, 400 if wrong else 200)

    def commit(self, name: str, revision: str):
        repo = self.repo(name, write=True)
        header, *operations = (json.loads(line) for line in self.read().splitlines())
        assert header['key'] == 'header'
        files = dict(self.at(repo, revision)[1])
        for operation in operations:
            said = operation['value']
            if operation['key'] == 'file':
                data = base64.b64decode(said['content'])
                oid = hashlib.sha256(data).hexdigest()
                self.hub.blobs[oid] = data
                files[said['path']] = oid, False
            elif operation['key'] == 'lfsFile':
                if said['oid'] not in self.hub.blobs:
                    raise Refused(400, None, f"LFS pointer pointed to a file that does not exist: {said['path']}")
                files[said['path']] = said['oid'], True
            elif files.pop(said['path'], None) is None:
                raise Refused(404, 'EntryNotFound', "A file with this name doesn't exist")
        with self.hub.lock:
            sha = hashlib.sha1(json.dumps([name, revision, sorted(files.items()), len(repo.messages)]).encode()).hexdigest()
            pull = {}
            if 'create_pr' in parse_qs(self.url.query):
                number = 1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)
                repo.refs[f'refs/pr/{number}'] = [*repo.refs[revision], (sha, files)]
                pull = {'pullRequestUrl': f'{self.hub.url}/{name}/discussions/{number}'}
            else:
                repo.refs[revision].append((sha, files))
            repo.messages.append(header['value']['summary'])
        self.reply({'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{name}/commit/{sha}', **pull})

    # -- downloads --

    def resolve(self, name: str, rest: str):
        repo = self.repo(name)
        revision = next((ref for ref in repo.refs if rest.startswith(f'{ref}/')), rest.partition('/')[0])
        sha, files = self.at(repo, revision)
        path = rest[len(revision) + 1:]
        if path not in files:
            return self.reply({'error': 'Entry not found'}, 404, **{'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': sha})
        oid, by_lfs = files[path]
        data = self.hub.blobs[oid]
        if by_lfs:
            return self.reply(b'', 302, **{'X-Repo-Commit': sha, 'X-Linked-Etag': f'"{oid}"', 'X-Linked-Size': str(len(data)),
                                           'Location': f'{self.storage}/blob/{oid}'})
        self.reply(data, **{'X-Repo-Commit': sha, 'ETag': f'"{git_hash(data)}"'})

    def blob(self, oid: str):
        self.hub.leaked |= 'Authorization' in self.headers
        self.reply(self.hub.blobs[oid], ETag=f'"{oid}"')

    # -- collections --

    def new_collection(self):
        user, may_write = self.user(write=True)
        said = self.json()
        if not may_write or said['namespace'] != user:
            raise Refused(403, None, 'Forbidden')
        slug = f"{user}/{re.sub(r'[^a-z0-9]+', '-', said['title'].lower())}-{hashlib.md5(said['title'].encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            return self.reply({'error': 'exists', 'slug': slug}, 409)
        self.hub.collections[slug] = {
            'slug': slug, 'title': said['title'], 'owner': {'name': user}, 'items': [], 'lastUpdated': WHEN, 'position': 0,
            'private': said['private'], 'theme': 'orange', 'upvotes': 0}
        self.reply(self.hub.collections[slug])

    def collection(self, slug: str):
        self.reply(self.hub.collections[slug])

    def add_item(self, slug: str):
        self.user(write=True)
        said, found = self.json(), self.hub.collections[slug]
        if any(item['id'] == said['item']['id'] for item in found['items']):
            raise Refused(409, None, 'already there')
        note = {'note': {'text': said['note'], 'html': ''}} if 'note' in said else {}
        found['items'].append({'_id': str(len(found['items'])), 'position': len(found['items']), **said['item'], **note})
        self.reply(found)

    def no_agents(self):
        self.reply({}, 404)


NAME = r'([\w.-]+/[\w.-]+)'
ROUTES = [
    ('GET', '/api/whoami-v2', _Handler.whoami),
    ('GET', '/api/agent-harnesses', _Handler.no_agents),
    ('POST', '/api/repos/create', _Handler.create),
    ('POST', '/api/validate-yaml', _Handler.validate),
    ('POST', '/api/collections', _Handler.new_collection),
    ('GET', rf'/api/collections/{NAME}', _Handler.collection),
    ('POST', rf'/api/collections/{NAME}/items', _Handler.add_item),
    ('GET', rf'/api/models/{NAME}(?:/revision/(.+))?', _Handler.info),
    ('POST', rf'/api/models/{NAME}/branch/(.+)', _Handler.branch),
    ('POST', rf'/api/models/{NAME}/preupload/(.+)', _Handler.preupload),
    ('POST', rf'/api/models/{NAME}/commit/(.+)', _Handler.commit),
    ('POST', rf'/{NAME}\.git/info/lfs/objects/batch', _Handler.batch),
    ('PUT', r'/lfs/(\w+)', _Handler.upload),
    ('POST', rf'/verify/{NAME}', _Handler.verify),
    (('GET', 'HEAD'), r'/blob/(\w+)', _Handler.blob),
    (('GET', 'HEAD'), rf'/{NAME}/resolve/(.+)', _Handler.resolve),
]
