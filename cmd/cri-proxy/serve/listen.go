// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/cri-proxy/cri-proxy/cmd/cri-proxy/config"
	"github.com/cri-proxy/cri-proxy/proxy"
)

// socketUnit is the name that systemd gives to a socket without
// FileDescriptorName=: that of its unit. It is the CRI socket.
const socketUnit = "cri-proxy.socket"

// sockets are the listeners that systemd has passed, by name: cri (or
// cri-proxy.socket), admin, ops and metrics.
type sockets struct {
	log    logrus.FieldLogger
	passed map[string][]net.Listener
}

// activated takes the listeners that systemd has passed, if any.
func activated(c *config.Config, log logrus.FieldLogger) (*sockets, error) {
	passed, err := proxy.ListenersFromSystemd()
	if err != nil {
		return nil, err
	}
	s := &sockets{log: log, passed: passed}
	if l := passed[socketUnit]; len(l) > 0 {
		passed["cri"] = append(passed["cri"], l...)
		delete(passed, socketUnit)
	}
	if len(passed["ops"]) > 0 && c.Ops.Address == "" || len(passed["metrics"]) > 0 && c.MetricsAddress == "" {
		return nil, errors.Join(errors.New("systemd passes a socket named ops or metrics, but ops.address or metricsAddress is empty; set it or remove the socket unit"), s.close())
	}
	return s, nil
}

// listen returns the passed socket of that name, else what open makes.
func (s *sockets) listen(name, address string, open func() (net.Listener, error)) (net.Listener, error) {
	l := s.passed[name]
	if len(l) == 0 {
		return open()
	}
	if len(l) > 1 {
		return nil, fmt.Errorf("systemd passes %d sockets named %s; one is wanted, remove ListenStream= lines", len(l), name)
	}
	delete(s.passed, name)
	if got := l[0].Addr().String(); got != address {
		s.log.WithFields(logrus.Fields{"socket": name, "passed": got, "configured": address}).Warn("using the socket that systemd passes, which differs from the configured one")
	}
	return l[0], nil
}

// unused returns an error if a passed socket has no use: nobody would ever answer on it.
func (s *sockets) unused() error {
	if len(s.passed) == 0 {
		return nil
	}
	var names []string
	for name := range s.passed {
		names = append(names, name)
	}
	slices.Sort(names)
	return fmt.Errorf("systemd passes sockets with unknown names: %s; FileDescriptorName= must be cri, admin, ops or metrics", strings.Join(names, ", "))
}

// close closes what listen did not hand out.
func (s *sockets) close() error {
	var errs []error
	for _, ls := range s.passed {
		for _, l := range ls {
			errs = append(errs, l.Close())
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
