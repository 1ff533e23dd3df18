// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cri-proxy/cri-proxy/interceptors/view"
	"github.com/cri-proxy/cri-proxy/internal/takeover"
	"github.com/cri-proxy/cri-proxy/proxy"
)

const (
	// quiesceTimeout bounds the wait for a moment at which the state can be given away. Operations
	// and the calls that take part in them end by themselves; the longest take a container's grace
	// period.
	quiesceTimeout = 2 * time.Minute
	// holdTimeout is how long an attempt may hold kubelet's calls, and quiesceInterval the time
	// between two attempts.
	holdTimeout     = time.Second
	quiesceInterval = time.Second
	// parkTimeout bounds the wait until the engine has left its operations, none of which stops a
	// container.
	parkTimeout = 3 * time.Second
	// takeoverOpsGrace is how long commands may take to end in a takeover. Their callers repeat
	// them.
	takeoverOpsGrace = 200 * time.Millisecond
	// servingTimeout is how long the successor may take until it serves. kubelet's calls wait
	// meanwhile.
	servingTimeout = 10 * time.Second
	// redialTimeout bounds the wait until clients know that they must dial anew.
	redialTimeout = time.Second
	// requestTimeout bounds the wait of a process that asks for the state, while this process finds
	// out that another one, which asked before, has gone away.
	requestTimeout = holdTimeout + quiesceInterval + time.Second
	// reportInterval is how often the successor gets a report of the remaining calls.
	reportInterval = time.Second
)

// takenOverCode is the exit code of a process that has ended after a takeover. systemd must not
// restart its unit then.
const takenOverCode = 10

// TakenOverError is the error of [Run] when another process has taken over. It is no failure.
type TakenOverError struct{ PID int }

func (e *TakenOverError) Error() string { return fmt.Sprintf("handed over to process %d", e.PID) }

// ExitCode is the exit code of the command.
func (*TakenOverError) ExitCode() int { return takenOverCode }

// request is a process that wants the state.
type request struct {
	*takeover.Conn
	pid     int
	pidfd   int
	version string
	said    string // to be waiting for

	// serving is closed when the process says that it serves, gone when its connection has ended.
	serving, gone chan struct{}
}

// listen reads messages until the connection ends.
func (r *request) listen() {
	defer close(r.gone)
	said := false
	for {
		m, err := r.Receive()
		if err != nil {
			return
		}
		if m.Serving && !said {
			said = true
			close(r.serving)
		}
	}
}

// isGone reports whether the process has given up.
func (r *request) isGone() bool {
	select {
	case <-r.gone:
		return true
	default:
		return false
	}
}

// close ends the connection, also while the successor waits for the state.
func (r *request) close() {
	r.Close()
	<-r.gone
	unix.Close(r.pidfd)
}

// waiting tells the successor, once, what the takeover waits for.
func (r *request) waiting(what string) {
	if r.said != what {
		r.said = what
		_ = r.Send(takeover.Message{Waiting: what})
	}
}

// listenForSuccessor opens the socket for the next process. Without the socket this process serves
// too, but cannot be replaced while it does.
func (d *daemon) listenForSuccessor() {
	l, err := takeover.Listen(d.config.StateDir)
	if err != nil {
		d.log.WithError(err).Warn("no takeover by another process")
		return
	}
	d.takeover = l
	d.workers.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			d.answer(conn)
		}
	})
}

// answer reads a request and answers it. It does not wait long for a process that sends none.
func (d *daemon) answer(conn *takeover.Conn) {
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	m, err := conn.Receive()
	_ = conn.SetReadDeadline(time.Time{})
	pid, perr := conn.PID()
	if err != nil || perr != nil {
		conn.Close()
		return
	}
	switch m.Want {
	case takeover.WantState:
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			break
		}
		r := &request{
			Conn: conn, pid: pid, pidfd: pidfd, version: m.Version,
			serving: make(chan struct{}), gone: make(chan struct{}),
		}
		timer := time.NewTimer(requestTimeout)
		defer timer.Stop()
		select {
		case d.requests <- r:
			return
		case <-timer.C:
			unix.Close(pidfd)
			_ = conn.Send(takeover.Message{Refused: "it hands over to another process already, " +
				"or is shutting down; try again"})
		}
	case takeover.WantRedial:
		d.log.WithField("pid", pid).Info("clients are made to dial anew")
		d.redial(context.Background())
		_ = conn.Send(takeover.Message{Done: true})
	default:
		_ = conn.Send(takeover.Message{Refused: fmt.Sprintf("%q is not known; this is an older version", m.Want)})
	}
	conn.Close()
}

// pause stops accepting connections. That takes microseconds, unless somebody has made the socket
// block.
func (n *node) pause(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, parkTimeout)
	defer cancel()
	return n.cri.Pause(ctx)
}

// redial makes the clients dial anew. It does not wait long for a client that does not read.
func (n *node) redial(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, redialTimeout)
	defer cancel()
	n.cri.Redial(ctx)
}

// transfer gives the state to another process. It returns the connection to which kubelet's calls
// go from now on. It returns nil if this process continues to serve, because no moment was right or
// because the other process could not serve. An error means that this process cannot serve either.
func (d *daemon) transfer(ctx context.Context, r *request) (*proxy.Upstream, error) {
	log := d.log.WithField("successor", r.pid).WithField("version", r.version)
	log.Info("another process wants to take over")
	defer d.handing.Store(false)
	taken := false
	defer func() {
		if !taken {
			r.close()
		}
	}()
	go r.listen() // ends with close
	hold, err := d.quiesce(ctx, r)
	if err != nil {
		log.WithError(err).Warn("no takeover")
		_ = r.Send(takeover.Message{Refused: err.Error()})
		return nil, nil
	}
	d.handing.Store(true)
	began := time.Now()
	d.stopServers(ctx, takeoverOpsGrace)
	st := d.state.Load()
	if !st.end(ctx, parkTimeout) {
		// An operation has begun to stop a container at the last moment. kubelet's calls go on
		// until it has ended.
		hold.Release()
		r.waiting("an operation that stops a container")
		ended := st.end(ctx, quiesceTimeout)
		if ctx.Err() != nil {
			return nil, nil // this process is to end, and lacks nothing for that
		}
		if !ended {
			return nil, errors.New("operations do not end; the next process takes them up")
		}
		if hold, err = d.cri.Hold(ctx); err != nil {
			return nil, nil // ctx has ended
		}
	}
	err = d.pause(ctx)
	carry := st.view.Carry()
	if err == nil {
		d.state.Store(nil)
		d.given = st.view
		if err := st.close(); err != nil {
			log.WithError(err).Error("closing the state")
		}
		if err = d.grant(r, carry); err == nil {
			var to *proxy.Upstream
			if to, err = proxy.NewUpstream(d.listen, proxy.UpstreamOptions{}); err == nil {
				taken = true
				hold.Divert(to.Conn())
				log.WithField("held", time.Since(began).Round(time.Millisecond)).Info("handed over")
				return to, nil
			}
		}
		log.WithError(err).Error("the other process does not serve, taking the state back")
	} else {
		log.WithError(err).Error("connections are accepted again, no takeover")
		_ = r.Send(takeover.Message{Refused: fmt.Sprintf("it cannot stop taking connections: %v; try again", err)})
		d.state.Store(nil)
		if err := st.close(); err != nil {
			log.WithError(err).Error("closing the state")
		}
	}
	// Also if this process has to end meanwhile: it answers its calls first.
	if err := d.openState(context.WithoutCancel(ctx), carry); err != nil {
		// This process cannot answer calls any more. Callers find the next process, which starts
		// when this one has ended.
		d.cri.Stop()
		return nil, fmt.Errorf("the state cannot be taken back, calls are cut: %w", err)
	}
	d.state.Load().run(ctx, d.fail)
	d.cri.Resume()
	hold.Release()
	log.WithField("held", time.Since(began).Round(time.Millisecond)).Warn("serving on")
	if ctx.Err() != nil {
		return nil, nil
	}
	err = d.startServers(ctx)
	if ctx.Err() != nil {
		return nil, nil // which is why, if it failed
	}
	return nil, err
}

// quiesce waits for a moment at which no operation and no call of kubelet's needs the state for
// long, and holds kubelet's calls.
func (d *daemon) quiesce(ctx context.Context, r *request) (*proxy.Hold, error) {
	ctx, cancel := context.WithTimeout(ctx, quiesceTimeout)
	defer cancel()
	for {
		hold, why := d.tryQuiesce(ctx)
		if hold != nil {
			return hold, nil
		}
		r.waiting(why)
		timer := time.NewTimer(quiesceInterval)
		select {
		case <-timer.C:
		case <-r.gone:
			timer.Stop()
			return nil, errors.New("the other process has gone away")
		case <-ctx.Done():
			timer.Stop()
			return nil, fmt.Errorf("waited for %s; try again, "+
				"or see what it waits for (cri-proxy ctl ops --active): %w", why, ctx.Err())
		}
	}
}

// tryQuiesce returns a hold, or the reason why there is none.
func (d *daemon) tryQuiesce(ctx context.Context) (*proxy.Hold, string) {
	st := d.state.Load()
	if uids := st.engine.Unleavable(); len(uids) > 0 {
		return nil, "operations that stop containers: " + strings.Join(uids, ", ")
	}
	ctx, cancel := context.WithTimeout(ctx, holdTimeout)
	defer cancel()
	hold, err := d.cri.Hold(ctx)
	if err != nil {
		return nil, err.Error()
	}
	// No call comes from kubelet any more: what is true now stays true, unless an operation changes
	// it.
	slots := st.view.Entangled()
	uids := st.engine.Unleavable()
	if len(slots) == 0 && len(uids) == 0 {
		return hold, ""
	}
	hold.Release()
	if len(uids) > 0 {
		return nil, "operations that stop containers: " + strings.Join(uids, ", ")
	}
	return nil, fmt.Sprintf("kubelet, which takes back %v", slots)
}

// grant tells the other process that the state is free, and waits until that process serves. If it
// does not, grant kills it: two processes with one state are worse than none.
func (d *daemon) grant(r *request, carry view.State) error {
	if r.isGone() {
		return errors.New("it has gone away")
	}
	granted := &takeover.Granted{View: carry, Remaining: d.remaining(carry.Stops)}
	if err := r.Send(takeover.Message{Granted: granted}); err != nil {
		return errors.Join(err, endProcess(r.pidfd))
	}
	timer := time.NewTimer(servingTimeout)
	defer timer.Stop()
	select {
	case <-r.serving:
		return nil
	case <-r.gone:
		return errors.Join(errors.New("it has gone away"), endProcess(r.pidfd))
	case <-timer.C:
		return errors.Join(fmt.Errorf("it has not served within %s", servingTimeout), endProcess(r.pidfd))
	}
}

// endProcess kills a process, if it still runs, and waits until it has ended.
func endProcess(pidfd int) error {
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return err
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(servingTimeout.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return errors.New("the other process does not end")
		default:
			return nil
		}
	}
}

// remaining returns the calls that remain here, with the stops that the caller knows.
func (n *node) remaining(stops []string) takeover.Remaining {
	return takeover.Remaining{
		Calls: int(n.cri.Stats().InFlight),
		Pulls: n.cri.InFlight(runtimeapi.ImageService_PullImage_FullMethodName),
		Stops: stops,
	}
}

// leave answers the remaining calls, for at most the takeover drain timeout, and ends. A signal
// shortens that to the drain timeout, a second one ends it at once.
func (d *daemon) leave(ctx, hard context.Context, r *request, to *proxy.Upstream) error {
	d.draining.Store(true)
	defer r.close()
	drain, cancel := context.WithTimeout(hard, d.config.TakeoverDrainTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		d.notify.stopping(d.config.DrainTimeout)
		timer := time.AfterFunc(d.config.DrainTimeout, cancel)
		context.AfterFunc(drain, func() { timer.Stop() })
	})()
	d.workers.Go(func() { d.reportRemaining(drain, r) })
	d.redial(hard)
	err := d.cri.Drain(drain)
	cancel()
	d.stopWork()
	d.workers.Wait()
	err = errors.Join(err, to.Close(), d.close())
	if err != nil {
		d.log.WithError(err).Warn("calls were cut after the takeover")
	}
	d.log.Info("all calls are over")
	return &TakenOverError{PID: r.pid}
}

// reportRemaining reports to the successor and to systemd which calls remain here, until ctx ends.
func (d *daemon) reportRemaining(ctx context.Context, r *request) {
	tick := time.NewTicker(reportInterval)
	defer tick.Stop()
	var last takeover.Remaining
	told := -1 // 0 calls are reported too: crash-guard goes by that
	for {
		now := d.remaining(d.given.Carry().Stops)
		if now.Calls != told {
			told = now.Calls
			d.notify.send(fmt.Sprintf("STATUS=Handed over to process %d, "+
				"%d calls are still under way", r.pid, now.Calls))
		}
		if now.Calls != last.Calls || now.Pulls != last.Pulls || !slices.Equal(now.Stops, last.Stops) {
			if r.Send(takeover.Message{Remaining: &now}) != nil {
				return // it may have been replaced itself
			}
		}
		last = now
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
