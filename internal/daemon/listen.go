// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/internal/config"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// socketUnit is the name that systemd gives to the CRI socket if its unit has no
// FileDescriptorName=.
const socketUnit = "cri-proxy.socket"

// sockets are the listening sockets that systemd has passed, by name: cri (or cri-proxy.socket),
// admin, ops and metrics. They stay open until the process ends, because it may need a listener
// again that a server has closed.
type sockets struct {
	log    logrus.FieldLogger
	passed map[string][]*os.File
	used   map[string]bool
}

// activated takes the sockets that systemd has passed, if any.
func activated(c *config.Config, log logrus.FieldLogger) (*sockets, error) {
	listeners, err := proxy.ListenersFromSystemd()
	if err != nil {
		return nil, err
	}
	s := &sockets{log: log, passed: map[string][]*os.File{}, used: map[string]bool{}}
	for name, ls := range listeners {
		if name == socketUnit {
			name = "cri"
		}
		for _, l := range ls {
			f, err := l.(interface{ File() (*os.File, error) }).File()
			l.Close()
			if err != nil {
				return nil, errors.Join(fmt.Errorf("socket %q from systemd: %w", name, err), s.close())
			}
			s.passed[name] = append(s.passed[name], f)
		}
	}
	if len(s.passed["ops"]) > 0 && c.Ops.Address == "" || len(s.passed["metrics"]) > 0 && c.MetricsAddress == "" {
		return nil, errors.Join(errors.New("systemd passes a socket named ops or metrics, "+
			"but ops.address or metricsAddress is empty; set it or remove the socket unit"), s.close())
	}
	return s, nil
}

// has reports whether systemd has passed a socket of that name.
func (s *sockets) has(name string) bool { return len(s.passed[name]) > 0 }

// listen returns the passed socket of that name, or else the listener that open makes.
func (s *sockets) listen(name, address string, open func() (net.Listener, error)) (net.Listener, error) {
	fs := s.passed[name]
	if len(fs) == 0 {
		return open()
	}
	if len(fs) > 1 {
		return nil, fmt.Errorf("systemd passes %d sockets named %s; one is wanted, "+
			"remove ListenStream= lines", len(fs), name)
	}
	l, err := net.FileListener(fs[0])
	if err != nil {
		return nil, fmt.Errorf("socket %q from systemd: %w", name, err)
	}
	if got := l.Addr().String(); got != address && !s.used[name] {
		s.log.WithFields(logrus.Fields{"socket": name, "passed": got, "configured": address}).
			Warn("using the socket that systemd passes, which differs from the configured one")
	}
	s.used[name] = true
	return shared{l}, nil
}

// shared is a listener whose socket systemd gives to the next instance, too.
type shared struct{ net.Listener }

// Accept implements [net.Listener].
func (s shared) Accept() (net.Conn, error) {
	proxy.Unblock(s.Listener)
	return s.Listener.Accept()
}

// SetDeadline is for the CRI server, which stops accepting from time to time.
func (s shared) SetDeadline(t time.Time) error {
	return s.Listener.(interface{ SetDeadline(t time.Time) error }).SetDeadline(t) // sockets have it
}

// unused returns an error if a passed socket has an unknown name: nobody would answer on it.
func (s *sockets) unused() error {
	var names []string
	for name := range s.passed {
		if !slices.Contains([]string{"cri", "admin", "ops", "metrics"}, name) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("systemd passes sockets with unknown names: %s; FileDescriptorName= must be cri, admin, "+
		"ops or metrics", strings.Join(names, ", "))
}

// close closes the sockets here; systemd keeps them.
func (s *sockets) close() error {
	var errs []error
	for _, fs := range s.passed {
		for _, f := range fs {
			errs = append(errs, f.Close())
		}
	}
	s.passed = nil
	return errors.Join(errs...)
}

func listenCRI(c *config.Config) (net.Listener, error) {
	uid, err := c.Listen.UID()
	if err != nil {
		return nil, err
	}
	gid, err := c.Listen.GID()
	if err != nil {
		return nil, err
	}
	return proxy.Listen(c.Listen.Path, proxy.ListenOptions{Mode: os.FileMode(c.Listen.Mode), UID: uid, GID: gid})
}

func listenTCP(ctx context.Context, address string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w; choose another address or stop who has it", err)
	}
	return l, nil
}
