// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"time"

	sddaemon "github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/connectivity"
)

// probeTimeout bounds the first self-probe: it stays within this machine and needs microseconds
// unless something is badly wrong. Those for the watchdog have a third of WatchdogSec at most.
const probeTimeout = 5 * time.Second

// notifier tells systemd the state of the service (sd_notify(3)). Without systemd it does nothing.
type notifier struct{ log logrus.FieldLogger }

func (n notifier) send(state string) {
	if _, err := sddaemon.SdNotify(false, state); err != nil {
		n.log.WithError(err).Warn("systemd not notified")
	}
}

// stopping announces the end, which may take as long as the drain.
func (n notifier) stopping(drain time.Duration) {
	n.send(fmt.Sprintf("STOPPING=1\nSTATUS=Draining, for at most "+
		"%s\nEXTEND_TIMEOUT_USEC=%d", drain, (drain + 10*time.Second).Microseconds()))
}

// watchdog pings systemd as long as alive returns no error: four times per WatchdogSec, so that one
// slow probe is no reason to be killed. Without a watchdog it returns at once.
func (n notifier) watchdog(ctx context.Context, alive func(context.Context) error) {
	interval, err := sddaemon.SdWatchdogEnabled(false)
	if err != nil {
		n.log.WithError(err).Warn("watchdog is off")
	}
	if err != nil || interval == 0 {
		return
	}
	tick := time.NewTicker(interval / 4)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		ask, cancel := context.WithTimeout(ctx, interval/3)
		err := alive(ask)
		cancel()
		if err != nil {
			n.log.WithError(err).Error("no watchdog ping")
			continue
		}
		n.send(sddaemon.SdNotifyWatchdog)
	}
}

// reportStatus keeps the STATUS line of the unit.
func (d *daemon) reportStatus(ctx context.Context) {
	for {
		state := d.upstream.State()
		if !d.draining.Load() {
			d.notify.send("STATUS=" + statusLine(d.listen, d.upstream.Endpoint(), state))
		}
		if !d.upstream.Conn().WaitForStateChange(ctx, state) {
			return
		}
	}
}

func statusLine(listen, endpoint string, state connectivity.State) string {
	if state == connectivity.Ready {
		return fmt.Sprintf("Relaying %s to %s", listen, endpoint)
	}
	return fmt.Sprintf("Listening on %s, runtime %s is away (%s)", listen, endpoint, state)
}
