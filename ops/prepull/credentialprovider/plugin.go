// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package credentialprovider

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/api/keyring"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

const (
	// execTimeout is kubelet's.
	execTimeout = time.Minute
	// maxAnswer is far above what a plugin has to say.
	maxAnswer = 1 << 20
	// execGrace is how long a child of a plugin that was killed may keep the output open.
	execGrace = time.Second
)

// Plugins are the credential providers of a node.
type Plugins struct {
	log     logrus.FieldLogger
	plugins []*plugin
}

// Load reads kubelet's file of providers, or a directory of such files. Their programs are in
// binDir. environ returns the environment that they get, to which the file adds: kubelet gives them
// its own, which may hold a proxy or a cloud's credentials.
//
// Errors: the file cannot be read, or kubelet would refuse it.
func Load(path, binDir string, environ func() []string, log logrus.FieldLogger) (*Plugins, error) {
	configs, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	p := &Plugins{log: log.WithField("component", "credentialprovider")}
	for _, c := range configs {
		if c.TokenAttributes != nil {
			p.log.WithField("provider", c.Name).
				Warn("wants tokens of pods' service accounts, which pulls ahead of time do not have: left out")
			continue
		}
		bin := filepath.Join(binDir, c.Name)
		if _, err := exec.LookPath(bin); err != nil {
			return nil, fmt.Errorf("%s: provider %q: %w", path, c.Name, err)
		}
		p.plugins = append(p.plugins, &plugin{config: c, bin: bin, environ: environ, kept: map[string]answer{}})
	}
	return p, nil
}

// Credentials returns what the providers have for an image without tag and digest, such as
// docker.io/library/nginx. A provider that fails has none, as with kubelet. A nil Plugins has none.
func (p *Plugins) Credentials(ctx context.Context, image string) []*opsv1.RegistryCredential {
	if p == nil {
		return nil
	}
	var out []*opsv1.RegistryCredential
	for _, g := range p.plugins {
		if !slices.ContainsFunc(g.config.MatchImages, func(m string) bool { return keyring.Match(m, image) }) {
			continue
		}
		found, err := g.credentials(ctx, image, time.Now())
		if err != nil {
			p.log.WithFields(logrus.Fields{"provider": g.config.Name, "image": image}).WithError(err).
				Warn("no credentials from the plugin")
		}
		out = append(out, found...)
	}
	return out
}

// plugin is one provider.
type plugin struct {
	config  providerConfig
	bin     string
	environ func() []string

	mu   sync.Mutex        // held while the program runs, too: its answer may be for the next image as well
	kept map[string]answer // by cache key
}

type answer struct {
	until       time.Time
	credentials []*opsv1.RegistryCredential
}

// globalKey is the cache key of an answer for all images.
const globalKey = "<global>"

func (g *plugin) credentials(ctx context.Context, image string, now time.Time) ([]*opsv1.RegistryCredential, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	maps.DeleteFunc(g.kept, func(_ string, a answer) bool { return !now.Before(a.until) })
	registry, _, _ := strings.Cut(image, "/")
	for _, key := range []string{image, registry, globalKey} {
		if a, ok := g.kept[key]; ok {
			return a.credentials, nil
		}
	}
	r, err := g.run(ctx, image)
	if err != nil {
		return nil, err
	}
	key, ok := map[string]string{"Image": image, "Registry": registry, "Global": globalKey}[r.CacheKeyType]
	if !ok {
		return nil, fmt.Errorf("cacheKeyType of the answer is %.40q; want Image, Registry or Global", r.CacheKeyType)
	}
	keep := *g.config.DefaultCacheDuration
	if r.CacheDuration != nil {
		if keep, err = time.ParseDuration(*r.CacheDuration); err != nil {
			return nil, errors.New("cacheDuration of the answer is no duration")
		}
	}
	var found []*opsv1.RegistryCredential
	for _, match := range slices.Sorted(maps.Keys(r.Auth)) {
		found = append(found, &opsv1.RegistryCredential{
			Match: match, Username: r.Auth[match].Username, Password: r.Auth[match].Password,
		})
	}
	if keep > 0 {
		g.kept[key] = answer{until: now.Add(keep), credentials: found}
	}
	return found, nil
}

// request is CredentialProviderRequest.
type request struct {
	Kind       string `json:"kind"`
	APIVersion string `json:"apiVersion"`
	Image      string `json:"image"`
}

// response is CredentialProviderResponse.
type response struct {
	Kind          string  `json:"kind"`
	APIVersion    string  `json:"apiVersion"`
	CacheKeyType  string  `json:"cacheKeyType"`
	CacheDuration *string `json:"cacheDuration"`
	Auth          map[string]struct {
		Username string `json:"username"`
		Password string `json:"password"`
	} `json:"auth"`
}

// run asks the program. No error quotes what the program says: that may be credentials.
func (g *plugin) run(ctx context.Context, image string) (*response, error) {
	ctx, expire := context.WithTimeoutCause(ctx, execTimeout, fmt.Errorf("no answer within %s", execTimeout))
	defer expire()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	in, err := json.Marshal(request{Kind: "CredentialProviderRequest", APIVersion: g.config.APIVersion, Image: image})
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, g.bin, g.config.Args...)
	cmd.Env = slices.Clone(g.environ())
	for _, e := range g.config.Env {
		cmd.Env = append(cmd.Env, e.Name+"="+e.Value)
	}
	out := &limited{left: maxAnswer, over: func() { cancel(errTooLong) }}
	cmd.Stdin, cmd.Stdout, cmd.WaitDelay = bytes.NewReader(in), out, execGrace
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	var r response
	if err := json.Unmarshal(out.buffer.Bytes(), &r); err != nil {
		return nil, errors.New("the answer is not JSON of a CredentialProviderResponse")
	}
	if r.Kind != "CredentialProviderResponse" || r.APIVersion != g.config.APIVersion {
		return nil, fmt.Errorf("the answer is a %.60q of %.60q; want CredentialProviderResponse of %s",
			r.Kind, r.APIVersion, g.config.APIVersion)
	}
	return &r, nil
}

// limited is a buffer with an upper bound. It embeds no buffer: io.Copy would use the buffer's own
// ReadFrom, which has no bound.
type limited struct {
	buffer bytes.Buffer
	left   int
	over   func()
}

var errTooLong = errors.New("the answer is too long")

// Write implements [io.Writer].
func (l *limited) Write(p []byte) (int, error) {
	if l.left -= len(p); l.left < 0 {
		l.over() // the program would wait for a reader
		return 0, errTooLong
	}
	return l.buffer.Write(p)
}
