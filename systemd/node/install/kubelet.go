// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/internal/atomicfile"
	"github.com/cri-proxy/cri-proxy/internal/backoff"
	"github.com/cri-proxy/cri-proxy/internal/bypassstate"
	"github.com/cri-proxy/cri-proxy/ops/apiserver"
	"github.com/cri-proxy/cri-proxy/systemd/node/bypass"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/plan"
	"github.com/cri-proxy/cri-proxy/systemd/node/install/record"
	"github.com/cri-proxy/cri-proxy/systemd/node/kubelet"
	"github.com/cri-proxy/cri-proxy/systemd/node/systemctl"
)

// watch checks that kubelet works after a restart.
type watch struct {
	unit string
	// healthz is host:port of kubelet's health check. Empty: unknown.
	healthz string
	// admin is the proxy's admin socket if kubelet must call through the proxy, else empty.
	admin string
	// api and node are for asking whether the node is ready. Nil: not asked.
	api     *apiserver.Client
	node    string
	timeout time.Duration
}

// restart restarts kubelet and waits until it works.
func (w *watch) restart(ctx context.Context) error {
	if err := systemctl.Run(ctx, "daemon-reload"); err != nil {
		return err
	}
	before, err := systemctl.Show(ctx, w.unit, "NRestarts")
	if err != nil {
		return err
	}
	base, _ := strconv.Atoi(before["NRestarts"])
	since := time.Now()
	_ = systemctl.Run(ctx, "reset-failed", w.unit) // it is only tried more often than systemd would
	if err := systemctl.Run(ctx, "restart", w.unit); err != nil {
		return fmt.Errorf("%w%s", err, w.journal(ctx))
	}
	within, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	for {
		var over bool
		if over, err = w.look(within, since, base); err == nil {
			return nil
		}
		if over {
			break
		}
		if backoff.Sleep(within, pollInterval) != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			err = fmt.Errorf("within %s: %w", w.timeout, err)
			break
		}
	}
	return fmt.Errorf("%w%s", err, w.journal(ctx))
}

// look returns nil if kubelet works. over is true if it never will. base is how often systemd had
// restarted kubelet before.
func (w *watch) look(ctx context.Context, since time.Time, base int) (over bool, err error) {
	u, err := systemctl.Show(ctx, w.unit, "ActiveState", "SubState", "NRestarts", "Result")
	if err != nil {
		return false, err
	}
	n, _ := strconv.Atoi(u["NRestarts"])
	if n >= base {
		n -= base
	}
	if u["ActiveState"] == "failed" || n > 1 || n == 1 && u["SubState"] == "auto-restart" {
		return true, fmt.Errorf("%s does not stay up (%s)", w.unit, u["Result"])
	}
	if u["ActiveState"] != "active" {
		return false, fmt.Errorf("%s is %s", w.unit, u["ActiveState"])
	}
	if err := w.healthy(ctx); err != nil {
		return false, err
	}
	if w.admin != "" {
		if err := w.calls(ctx, since); err != nil {
			return false, err
		}
	}
	if w.api != nil {
		return false, notReady(ctx, w.api, w.node, since)
	}
	return false, nil
}

// healthy asks kubelet's health check.
func (w *watch) healthy(ctx context.Context) error {
	if w.healthz == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.healthz+"/healthz", nil)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("kubelet is not up: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 500))
		return fmt.Errorf("kubelet is not healthy: %s: %s", resp.Status, b)
	}
	return nil
}

// calls returns nil if a call has come through the proxy since then.
func (w *watch) calls(ctx context.Context, since time.Time) error {
	conn, err := bypass.Dial(w.admin)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	info, err := opsv1.NewOpsClient(conn).NodeInfo(ctx, &opsv1.NodeInfoRequest{})
	if err != nil {
		return fmt.Errorf("cri-proxy does not answer: %w", err)
	}
	if !info.GetKubeletLastCall().AsTime().After(since) {
		return errors.New("kubelet has not called through cri-proxy")
	}
	return nil
}

// journal returns the last lines that kubelet has logged.
func (w *watch) journal(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	out, err := systemctl.Command(ctx, "journalctl", "-u", w.unit, "-n", "8", "--no-pager", "-o", "cat")
	if err != nil || strings.TrimSpace(out) == "" {
		return ""
	}
	return "\n" + w.unit + " says:\n    " + strings.ReplaceAll(strings.TrimSpace(out), "\n", "\n    ")
}

// newWatch returns how to watch this kubelet. A warning says what cannot be asked, and why.
func newWatch(
	ctx context.Context, k *kubelet.Kubelet, unit, kubeconfigFile string, timeout time.Duration,
) (w *watch, warnings []string) {
	w = &watch{unit: unit, timeout: timeout}
	if k == nil {
		return w, nil
	}
	w.healthz = k.HealthzAddress()
	if kubeconfigFile == "" {
		kubeconfigFile = k.Kubeconfig()
	}
	if kubeconfigFile == "" {
		return w, []string{"kubelet has no kubeconfig: whether the node is ready is not asked"}
	}
	api, err := apiserver.Connect(ctx, kubeconfigFile, k.Environ())
	if err != nil {
		return w, []string{fmt.Sprintf("whether the node is ready is not asked: %v", err)}
	}
	node, err := k.NodeName()
	if name, ok := strings.CutPrefix(api.User(), "system:node:"); ok {
		node, err = name, nil
	}
	if err == nil {
		err = notReady(ctx, api, node, time.Time{})
	}
	if err != nil { // it cannot become what it was not
		api.Close()
		return w, []string{fmt.Sprintf("whether the node is ready is not asked afterwards: %v", err)}
	}
	w.api, w.node = api, node
	return w, nil
}

// pointing returns the action that makes kubelet dial our symlink.
func (i *installer) pointing(k *kubelet.Kubelet, edits []kubelet.Edit, w *watch, r *record.Record) plan.Action {
	restarted, fresh := false, !r.Exists()
	worked := r.Exists() && !r.Pending // as it is, through us
	what := fmt.Sprintf("point kubelet at %s", i.ours())
	var diffs strings.Builder
	for _, e := range edits {
		what += ", in " + e.Path
		diffs.WriteString(plan.Diff(e.Path, e.Before, e.After))
	}
	if len(edits) == 0 {
		what = "kubelet's files are as they should be"
	}
	return plan.Action{
		What: what + fmt.Sprintf("; restart %s and wait until it calls through "+
			"cri-proxy", w.unit), Diff: diffs.String(),
		Do: func(ctx context.Context) error {
			if _, err := runtimeVersion(ctx, i.kubeletSocket()); err != nil {
				return fmt.Errorf("no answer through %s, so kubelet is left alone: %w; see journalctl -u 'cri-proxy@*'",
					i.kubeletSocket(), err)
			}
			if fresh {
				endpoint, err := k.Endpoint()
				if err != nil {
					return err
				}
				r.Endpoint = endpoint
			}
			r.Unit, r.Ours = w.unit, i.ours()
			if err := r.Keep(edits); err != nil {
				return err
			}
			for _, e := range edits {
				if err := atomicfile.Write(e.Path, e.After, e.Mode); err != nil {
					return err
				}
			}
			restarted = true
			if bypassstate.Read(i.Config.StateDir) == nil { // otherwise it does not call through the proxy
				w.admin = i.Config.AdminSocket
			}
			if err := w.restart(ctx); err != nil {
				return err
			}
			r.Pending = false
			return r.Write()
		},
		Holds: true,
		Undo: func(ctx context.Context) error {
			var errs []error
			if worked {
				for _, e := range edits {
					errs = append(errs, plan.Put(e.Path, e.Before, e.Mode))
				}
			} else {
				did, err := r.Restore()
				restarted = restarted || did // it may run with what an install before this one has written
				errs = append(errs, err)
			}
			if restarted {
				w.admin, w.api = "", nil // the API server may be what is away
				if err := w.restart(ctx); err != nil {
					errs = append(errs, fmt.Errorf("kubelet with its configuration of before: %w", err))
				}
			}
			if err := errors.Join(errs...); err != nil || worked {
				return err
			}
			return r.Forget()
		},
	}
}
