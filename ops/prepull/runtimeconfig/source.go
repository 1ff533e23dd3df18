// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package runtimeconfig

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/http/httpproxy"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/ops/process"
)

// readTimeout bounds the questions to this machine.
const readTimeout = 2 * time.Second

// Options configures a [Source]. Socket and Log are required.
type Options struct {
	// Socket is the path of the runtime's socket.
	Socket string
	// HostsDir, if set, is read instead of containerd's config_path and mirrors. Like config_path,
	// it may be several directories with colons between them.
	HostsDir string
	// Conn is asked for the runtime's version. Nil: the version is one that this module has the
	// code of.
	Conn grpc.ClientConnInterface
	// Proc is where procfs is mounted; empty is /proc.
	Proc string
	Log  logrus.FieldLogger
}

// Source tells how the containerd behind a socket reaches registries. Its methods may be called at
// the same time.
type Source struct {
	o Options

	mu    sync.Mutex // guards all following fields
	last  *settings
	words string // the last error, so that it is logged once
}

// New returns a source. It reads nothing yet: the runtime may come later.
func New(o Options) *Source {
	if o.Proc == "" {
		o.Proc = "/proc"
	}
	return &Source{o: o}
}

// settings are those of one process of containerd. containerd reads its file when it starts, and we
// read the file when we first see the process. Both read the directories of config_path for each
// image.
type settings struct {
	process  process.Process
	file     string
	registry *registry
	// legacy says that the settings of 1.x for TLS count, and that config_path has no default.
	legacy bool
	// proxies is nil where the environment is not known, and unknown is why.
	proxies *httpproxy.Config
	unknown error
}

// Hosts tells how registries are reached, with the credentials and the hook of options; see the
// type Hosts of package registry. If containerd's settings cannot be read, those of this process
// count, and that is logged once. The only error is ctx's.
func (s *Source) Hosts(ctx context.Context, options config.HostOptions) (docker.RegistryHosts, error) {
	c, err := s.settings(ctx)
	if cause := ctx.Err(); cause != nil {
		return nil, cause
	}
	s.say(err)
	if err != nil {
		c = &settings{registry: &registry{}}
	}
	return c.hosts(ctx, options, s.o.HostsDir), nil
}

func (s *Source) say(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	words := ""
	if err != nil {
		words = err.Error()
	}
	if words != "" && words != s.words {
		s.o.Log.WithError(err).Warn("containerd's settings of registries are not known: pulls with a speed limit use " +
			"images.registryHostsDir, or " + defaultConfigPath + ", and cri-proxy's own environment")
	}
	s.words = words
}

// settings returns the settings of the process that listens now.
func (s *Source) settings(ctx context.Context) (*settings, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	who, err := process.Listener(ctx, s.o.Proc, s.o.Socket)
	if err != nil {
		return nil, fmt.Errorf("who listens on %s: %w", s.o.Socket, err)
	}
	s.mu.Lock()
	last := s.last
	s.mu.Unlock()
	if last != nil && last.process == who {
		return last, nil
	}
	c, err := s.read(ctx, who)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = c
	return c, nil
}

func (s *Source) read(ctx context.Context, who process.Process) (*settings, error) {
	// Some distributions wrap it, as .containerd-wrapped.
	if name := who.Name(s.o.Proc); !strings.Contains(name, "containerd") {
		return nil, fmt.Errorf("%s is served by %q (process %d) and not by containerd", s.o.Socket, name, who.PID)
	}
	args, err := who.Args(s.o.Proc)
	if err != nil {
		return nil, err
	}
	c := &settings{process: who}
	file, told := configFile(args[min(1, len(args)):])
	cwd, err := os.Readlink(filepath.Join(s.o.Proc, strconv.Itoa(who.PID), "cwd"))
	if err != nil && !filepath.IsAbs(file) {
		return nil, fmt.Errorf("process %d: %w", who.PID, err)
	}
	if c.registry, err = readFile(ctx, file, cwd, told); err != nil {
		return nil, err
	}
	c.file = file
	if s.o.Conn != nil {
		v, err := runtimeapi.NewRuntimeServiceClient(s.o.Conn).Version(ctx, &runtimeapi.VersionRequest{})
		if err != nil {
			return nil, fmt.Errorf("version of containerd: %w", err)
		}
		c.legacy = major(v.GetRuntimeVersion()) == 1
	}
	if r := c.registry; r.ConfigPath == "" && len(r.Mirrors) == 0 && !c.legacy {
		r.ConfigPath = defaultConfigPath
	}
	environ, err := who.Environ(s.o.Proc)
	if err != nil { // its registries are known all the same
		s.o.Log.WithError(err).Warn("containerd's environment is not known: " +
			"pulls with a speed limit go through the proxies of cri-proxy's own")
		c.unknown = err
		return c, nil
	}
	c.proxies = process.Proxies(environ)
	return c, nil
}

// client returns a function that gives a client of docker.DefaultHTTPTransport the proxies that
// containerd's clients have, and then calls next, which may be nil.
func (c *settings) client(next config.UpdateClientFunc) config.UpdateClientFunc {
	var proxy func(*url.URL) (*url.URL, error)
	if c.proxies != nil {
		proxy = c.proxies.ProxyFunc()
	}
	return func(client *http.Client) error {
		if t, ok := client.Transport.(*http.Transport); ok && proxy != nil {
			t.Proxy = func(r *http.Request) (*url.URL, error) { return proxy(r.URL) }
		}
		if next == nil {
			return nil
		}
		return next(client)
	}
}

// Summary is for people. It has no secrets: of proxies only the host.
type Summary struct {
	PID int
	// File is containerd's configuration, whether it is there or not.
	File string
	// Dirs are searched for hosts.toml, in this order.
	Dirs []string
	// Mirrors are the registries that the file itself has mirrors for; they count if Dirs is empty.
	Mirrors []string
	// HTTPProxy and HTTPSProxy are URLs such as http://proxy:3128, or empty.
	HTTPProxy, HTTPSProxy, NoProxy string
	// Unknown is why the proxies are not known, nil if they are.
	Unknown error
}

// Look returns what is found now.
//
// Errors: nobody listens, it is not containerd, or its process or its file cannot be read.
func (s *Source) Look(ctx context.Context) (*Summary, error) {
	c, err := s.settings(ctx)
	if err != nil {
		return nil, err
	}
	out := &Summary{
		PID: c.process.PID, File: c.file, Dirs: filepath.SplitList(c.registry.ConfigPath), Unknown: c.unknown,
	}
	for name := range c.registry.Mirrors {
		out.Mirrors = append(out.Mirrors, name)
	}
	slices.Sort(out.Mirrors)
	if c.proxies != nil {
		out.NoProxy = c.proxies.NoProxy
		out.HTTPProxy, out.HTTPSProxy = bare(c.proxies.HTTPProxy), bare(c.proxies.HTTPSProxy)
	}
	return out, nil
}

// notShown stands for what cannot be shown.
const notShown = "not shown: no URL"

// bare returns the address of a proxy without user, password, path and query.
func bare(proxy string) string {
	if proxy == "" {
		return ""
	}
	if !strings.Contains(proxy, "://") { // httpproxy takes host:port, too
		proxy = "http://" + proxy
	}
	u, err := url.Parse(proxy)
	if err != nil || u.Host == "" {
		return notShown
	}
	return u.Scheme + "://" + u.Host
}

// String says in one sentence how images are pulled.
func (s *Summary) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "containerd (process %d, %s) ", s.PID, s.File)
	switch {
	case len(s.Dirs) > 0:
		fmt.Fprintf(&b, "reads hosts.toml below %s", strings.Join(s.Dirs, ", then "))
	case len(s.Mirrors) > 0:
		fmt.Fprintf(&b, "has mirrors for %s in that file", strings.Join(s.Mirrors, ", "))
	default:
		b.WriteString("goes to registries themselves")
	}
	if s.Unknown != nil {
		fmt.Fprintf(&b, "; whether through a proxy is not known (%v)", s.Unknown)
		return b.String()
	}
	if s.HTTPProxy == "" && s.HTTPSProxy == "" {
		b.WriteString(", without a proxy")
		return b.String()
	}
	var through []string
	for scheme, proxy := range map[string]string{"https": s.HTTPSProxy, "http": s.HTTPProxy} {
		if proxy != "" {
			through = append(through, scheme+" through "+proxy)
		}
	}
	slices.Sort(through)
	fmt.Fprintf(&b, "; %s", strings.Join(through, ", "))
	if s.NoProxy != "" {
		fmt.Fprintf(&b, ", but for %s", s.NoProxy)
	}
	return b.String()
}
