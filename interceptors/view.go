// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StagedAnnotation marks a container that an operation created. Its value is
// the token of that stage: the container is hidden as long as the [View] holds
// the token, and only then, so that a container keeps the annotation for life
// without staying hidden, and is hidden again after a crash before its ID is known.
const StagedAnnotation = "cri-proxy.io/staged"

// Slot is the place of one container in a pod: its successive attempts share it.
type Slot struct {
	PodUID    string
	Container string
}

// String returns the slot as podUID/container.
func (s Slot) String() string { return s.PodUID + "/" + s.Container }

// View is what kubelet must see. The zero value is not usable; see [NewView].
// All methods are safe for concurrent use.
type View struct {
	// active is how many claims have something to say. The pass path reads only this.
	active atomic.Int32
	// guard says what a token means that the view does not hold; see Guard. The pass path reads it, too.
	guard atomic.Int32
	// round is set from a list of sandboxes to one of containers.
	round atomic.Bool
	// carried is closed once the view goes on in another process.
	carried chan struct{}
	leave   sync.Once

	mu sync.RWMutex // guards all following fields
	// known are the tokens that say nothing new, while there is a guard; strays the claims that hold no slot.
	known  map[string]struct{}
	strays map[*Claim]struct{}
	// passing counts, by method, the calls that went through undecoded and are not answered yet:
	// they may still carry what becomes hidden meanwhile. idle, if not nil, is closed when there is
	// none.
	passing map[string]int
	idle    chan struct{}
	// cuttable are those of them whose methods are not known.
	cuttable map[*cuttable]struct{}
	// nothing, if not nil, is closed when nothing is hidden any more.
	nothing chan struct{}
	looks   map[*look]struct{}
	claims  map[Slot]*Claim
	queues  map[Slot][]chan *Claim
	tokens  map[string]*Claim
	ids     map[string]*Claim // staged and masked container IDs
	streams map[*eventFilter]struct{}
	// heirs are the successors of incumbents that were shown exited, until those are removed.
	heirs map[string]*heir
	// untold has the successors, by incumbent, that were revealed and that kubelet does not go by yet; see told.
	untold map[string]untold
	stops  map[string]int // container and sandbox IDs, as given, with a stop of kubelet's in flight
	// elsewhere are such IDs with a stop in flight in the process before this one.
	elsewhere []string
	// started has when the processes of containers began whose start the runtime tells too early, quiet those that are shown to
	// have begun later than they have. starts is the size of both, for the pass path.
	started map[string]time.Time
	quiet   map[string]quiet
	starts  atomic.Int32
	// awaited has what waits for the next container of a slot; see [View.WhenCreated].
	awaited map[Slot]awaited
}

// NewView returns a view that hides and masks nothing.
func NewView() *View {
	return &View{
		carried: make(chan struct{}),
		passing: map[string]int{}, cuttable: map[*cuttable]struct{}{},
		looks:   map[*look]struct{}{},
		claims:  map[Slot]*Claim{},
		queues:  map[Slot][]chan *Claim{},
		tokens:  map[string]*Claim{},
		ids:     map[string]*Claim{},
		streams: map[*eventFilter]struct{}{},
		strays:  map[*Claim]struct{}{},
		heirs:   map[string]*heir{},
		untold:  map[string]untold{},
		stops:   map[string]int{},
		started: map[string]time.Time{},
		quiet:   map[string]quiet{},
		awaited: map[Slot]awaited{},
	}
}

// Active reports whether any answer to kubelet may need a change.
func (v *View) Active() bool { return v.active.Load() > 0 }

// pass registers a call that goes through undecoded; done must be called when
// it has been answered. ok is false when the view has become active meanwhile.
func (v *View) pass(method string) (done func(), ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.Active() || v.Guarded() {
		return nil, false
	}
	switch method {
	case runtimeapi.RuntimeService_ListContainers_FullMethodName, runtimeapi.RuntimeService_StreamContainers_FullMethodName:
		v.round.Store(false) // whatever its filter is
	}
	v.passing[method]++
	return func() { v.passed(method) }, true
}

func (v *View) passed(method string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.passedLocked(method)
}

func (v *View) passedLocked(method string) {
	if v.passing[method]--; v.passing[method] == 0 {
		delete(v.passing, method)
	}
	if len(v.passing) == 0 && v.idle != nil {
		close(v.idle)
		v.idle = nil
	}
}

// passingNames returns the methods of calls that pass undecoded, ordered, without their services.
func (v *View) passingNames() string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var names []string
	for method := range v.passing {
		names = append(names, method[strings.LastIndexByte(method, '/')+1:])
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// Yield says that kubelet, or whoever speaks CRI through the proxy, takes the
// slot back, and how.
type Yield struct {
	// Method is the CRI method that asked.
	Method string
	// Grace is how long the processes of the slot may take to stop, in seconds.
	Grace int64
}

// Claim is an operation's exclusive hold on a slot.
type Claim struct {
	view *View
	slot Slot

	yielded chan struct{}
	done    chan struct{}

	// The rest is guarded by view.mu.
	yield     *Yield
	sandbox   string
	incumbent string
	token     string
	successor string
	speaking  bool
	released  bool
	driven    chan struct{} // closed once driver is set; nil if there will be none
	driver    Driver
}

// ErrClaimed is returned by TryClaim when the slot is taken.
var ErrClaimed = errors.New("another operation holds the slot")

// Claim waits, first come first served, until no one holds the slot and takes
// it. It returns ctx's error if that ends first.
func (v *View) Claim(ctx context.Context, slot Slot) (*Claim, error) {
	v.mu.Lock()
	if v.claims[slot] == nil && len(v.queues[slot]) == 0 {
		c := v.newClaimLocked(slot)
		v.mu.Unlock()
		return c, nil
	}
	turn := make(chan *Claim, 1) // the releaser makes the claim on our behalf
	v.queues[slot] = append(v.queues[slot], turn)
	v.mu.Unlock()

	select {
	case c := <-turn:
		return c, nil
	case <-ctx.Done():
	}
	v.mu.Lock()
	q := v.queues[slot]
	i := slices.Index(q, turn)
	if i >= 0 {
		v.queues[slot] = slices.Delete(q, i, i+1)
	}
	v.mu.Unlock()
	if i < 0 { // the turn came at the same moment
		(<-turn).Release()
	}
	return nil, ctx.Err()
}

// TryClaim takes the slot or returns [ErrClaimed] at once.
func (v *View) TryClaim(slot Slot) (*Claim, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.claims[slot] != nil || len(v.queues[slot]) > 0 {
		return nil, ErrClaimed
	}
	return v.newClaimLocked(slot), nil
}

// Claimed reports whether someone holds the slot.
func (v *View) Claimed(slot Slot) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.claims[slot] != nil
}

func (v *View) newClaimLocked(slot Slot) *Claim {
	c := &Claim{view: v, slot: slot, yielded: make(chan struct{}), done: make(chan struct{})}
	v.claims[slot] = c
	return c
}

// Slot returns the slot that is held.
func (c *Claim) Slot() Slot { return c.slot }

// Bind names the sandbox and the incumbent, so that kubelet's calls on them find
// the claim. It hides and masks nothing by itself.
func (c *Claim) Bind(sandbox, incumbent string) {
	c.view.mu.Lock()
	defer c.view.mu.Unlock()
	c.sandbox, c.incumbent = sandbox, incumbent
}

// Hide makes the view speak for this claim: from its return on, no answer shows
// a container that carries the token. It waits until answers that were already on
// their way undecoded have passed, at most until ctx ends (then nothing is
// hidden, and the error names the calls that have not been answered and wraps ctx's).
func (c *Claim) Hide(ctx context.Context, token string) error {
	idle := c.hide(token)
	cut := time.NewTimer(cutPatience)
	defer cut.Stop()
	for {
		select {
		case <-idle:
			return nil
		case <-cut.C:
			c.view.cutUnknown()
		case <-ctx.Done():
			names := c.view.passingNames()
			c.Discard()
			return fmt.Errorf("not answered yet: %s: %w", names, ctx.Err())
		}
	}
}

// HideNow is Hide for the time before the first call is served.
func (c *Claim) HideNow(token string) { c.hide(token) }

// hide returns a channel that is closed once no answer is on its way undecoded. While
// the claim speaks, none begins.
func (c *Claim) hide(token string) <-chan struct{} {
	v := c.view
	v.mu.Lock()
	defer v.mu.Unlock()
	if c.token != "" {
		delete(v.tokens, c.token)
	}
	c.token = token
	v.tokens[token] = c
	v.knowLocked(token)
	if !c.speaking {
		c.speaking = true
		v.active.Add(1)
	}
	for l := range v.looks {
		l.tokens[token] = struct{}{}
	}
	for id, owner := range v.ids {
		if owner == c {
			v.noteLocked(c, id, v.verdictLocked(id))
		}
	}
	if len(v.passing) == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if v.idle == nil {
		v.idle = make(chan struct{})
	}
	return v.idle
}

// Staged names the container that carries the token, once it is known.
func (c *Claim) Staged(id string) {
	c.view.mu.Lock()
	defer c.view.mu.Unlock()
	if c.successor != "" {
		delete(c.view.ids, c.successor)
	}
	c.successor = id
	if id != "" {
		c.view.ids[id] = c
		c.view.noteLocked(c, id, hidden)
	}
}

// Mask makes the incumbent be shown running from now on.
//
// It does nothing once the claim is settled.
func (c *Claim) Mask() {
	c.view.mu.Lock()
	defer c.view.mu.Unlock()
	if !c.speaking {
		return
	}
	c.view.ids[c.incumbent] = c
	c.view.noteLocked(c, c.incumbent, masked)
}

// Reveal ends hiding and masking in one step: the next list, but for that of a round of kubelet's which is under way (see
// [View.told]), shows both containers as they are, and from then on so does their status. Events that were held back are sent.
func (c *Claim) Reveal() { c.settle(true) }

// TryReveal is [Claim.Reveal], unless someone has taken the slot back: then it does
// nothing and returns false. Who takes it back later finds the slot revealed.
func (c *Claim) TryReveal() bool {
	c.view.mu.Lock()
	defer c.view.mu.Unlock()
	if c.yield != nil {
		return false
	}
	c.settleLocked(true)
	return true
}

// Discard is Reveal for a successor that has been removed: events held back for
// it are dropped.
func (c *Claim) Discard() { c.settle(false) }

func (c *Claim) settle(show bool) {
	v := c.view
	v.mu.Lock()
	defer v.mu.Unlock()
	c.settleLocked(show)
}

func (c *Claim) settleLocked(show bool) {
	v := c.view
	if !c.speaking {
		return
	}
	c.speaking = false
	delete(v.strays, c)
	successor := c.successor
	v.active.Add(-1)
	if show && successor != "" && v.ids[c.incumbent] == c && len(v.untold) < maxHeirs {
		v.untold[c.incumbent] = untold{heir: heir{id: successor, sandbox: c.sandbox}, round: v.round.Load(), since: time.Now()}
		v.active.Add(1)
	}
	if v.tokens[c.token] == c {
		delete(v.tokens, c.token)
	}
	if len(v.tokens) == 0 && v.nothing != nil {
		close(v.nothing)
		v.nothing = nil
	}
	for _, id := range []string{c.successor, c.incumbent} {
		if v.ids[id] == c {
			delete(v.ids, id)
		}
	}
	if show && successor != "" && c.incumbent != "" && len(v.heirs) < maxHeirs {
		v.heirs[c.incumbent] = &heir{id: successor, sandbox: c.sandbox, slot: c.slot}
	}
	c.token, c.successor = "", ""
	for f := range v.streams {
		f.settleLocked(c, successor, show)
	}
}

// Yielded is closed when someone takes the slot back; see [Claim.YieldedTo].
func (c *Claim) Yielded() <-chan struct{} { return c.yielded }

// YieldedTo returns who took the slot back; nil if nobody has.
func (c *Claim) YieldedTo() *Yield {
	c.view.mu.RLock()
	defer c.view.mu.RUnlock()
	return c.yield
}

// Release gives the slot up and lets the next in line have it. Whatever is
// still hidden or masked is revealed. Releasing twice is fine.
func (c *Claim) Release() {
	v := c.view
	v.mu.Lock()
	defer v.mu.Unlock()
	if c.released {
		return
	}
	c.released = true
	c.settleLocked(true)
	close(c.done)
	delete(v.claims, c.slot)
	if q := v.queues[c.slot]; len(q) > 0 {
		q[0] <- v.newClaimLocked(c.slot)
		v.queues[c.slot] = q[1:]
	}
	if len(v.queues[c.slot]) == 0 {
		delete(v.queues, c.slot)
	}
}

// takeBack asks the operation that holds c to get out of the way.
func (c *Claim) takeBack(y Yield) {
	c.view.mu.Lock()
	defer c.view.mu.Unlock()
	if c.yield == nil {
		c.yield = &y
		close(c.yielded)
	}
}

// wait waits until the claim is released or ctx ends.
func (c *Claim) wait(ctx context.Context) error {
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// maxHeirs bounds what is remembered of reveals. kubelet keeps one exited container per slot, so this is room for
// more slots than a node has.
const maxHeirs = 4096

// heir is a container that took the place of an incumbent.
type heir struct {
	id, sandbox string
	slot        Slot
	// late is set when kubelet stopped the incumbent after it had been shown exited, which it does only to a container that it
	// saw running before: it may be killing the pod. grace is what it gave, in seconds.
	late  bool
	grace int64
}

// lateStop notes that kubelet stops a container that has been replaced.
func (v *View) lateStop(id string, grace int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for h := v.heirs[id]; h != nil; h = v.heirs[h.id] {
		h.late, h.grace = true, grace
	}
}

// lateHeir returns the container of the slot whose incumbent kubelet stopped late, or "".
func (v *View) lateHeir(slot Slot) string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, h := range v.heirs {
		if h.late && h.slot == slot && v.heirs[h.id] == nil {
			return h.id
		}
	}
	return ""
}

// lateHeirs returns the containers of the sandbox whose incumbents kubelet stopped late.
func (v *View) lateHeirs(sandbox string) []heir {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []heir
	for _, h := range v.heirs {
		if h.late && h.sandbox == sandbox {
			out = append(out, *h)
		}
	}
	return out
}

// Forget drops what is remembered of a container that does not exist any more.
func (v *View) Forget(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.heirs, id)
	v.tellLocked(func(incumbent string, u untold) bool { return incumbent == id || u.id == id })
	delete(v.started, id)
	delete(v.quiet, id)
	v.countStartsLocked()
}

func (v *View) countStartsLocked() { v.starts.Store(int32(len(v.started) + len(v.quiet))) }

// SetStarted says when the container's process really began, where the runtime tells an earlier time: that of a container
// that has been held at a gate. It counts until the container is removed.
func (v *View) SetStarted(id string, at time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.started[id] = at
	v.countStartsLocked()
}

// quiet is a container that kubelet is kept from probing.
type quiet struct {
	lasts time.Duration
	until time.Time // zero until the container is shown running
}

// HoldProbes keeps kubelet from probing the container for that long, from the moment on at which the container is first shown running:
// it is shown to have begun at the end of that time, as long as it runs. No probe is made before a container's start
// (prober/worker.go doProbe: InitialDelaySeconds), but a new container's startup probe says at its first turn that the container has not
// started yet, which keeps the others back from then on.
func (v *View) HoldProbes(id string, lasts time.Duration) { v.hold(id, quiet{lasts: lasts}) }

// HoldProbesUntil is [View.HoldProbes] of a container that may have been shown before.
func (v *View) HoldProbesUntil(id string, until time.Time) { v.hold(id, quiet{until: until}) }

func (v *View) hold(id string, q quiet) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.quiet[id] = q
	v.countStartsLocked()
}

// awaited is what waits for a container.
type awaited struct {
	until time.Time
	is    func(id string, req *runtimeapi.CreateContainerRequest) bool
}

// WhenCreated has is called with every container that is made in the slot, until it says that it is the one, or until then.
func (v *View) WhenCreated(slot Slot, until time.Time, is func(id string, req *runtimeapi.CreateContainerRequest) bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	maps.DeleteFunc(v.awaited, func(_ Slot, a awaited) bool { return time.Now().After(a.until) })
	v.awaited[slot] = awaited{until: until, is: is}
}

// created tells who waits for it.
func (v *View) created(slot Slot, id string, req *runtimeapi.CreateContainerRequest) {
	v.mu.Lock()
	a, ok := v.awaited[slot]
	v.mu.Unlock()
	if !ok || time.Now().Before(a.until) && !a.is(id, req) {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.awaited[slot].until.Equal(a.until) { // still the same
		delete(v.awaited, slot)
	}
}

// correct puts the start that is to be shown into the status of a container that is shown, and reports whether that changed it.
func (v *View) correct(s *runtimeapi.ContainerStatus) bool {
	if v.starts.Load() == 0 {
		return false
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.correctLocked(s)
}

func (v *View) correctLocked(s *runtimeapi.ContainerStatus) bool {
	at, ok := v.started[s.GetId()]
	if q, is := v.quiet[s.GetId()]; is && s.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
		if q.until.IsZero() {
			q.until = time.Now().Add(q.lasts)
			v.quiet[s.GetId()] = q
		}
		at, ok = q.until, true
	}
	if !ok || s.GetStartedAt() == 0 || s.GetStartedAt() == at.UnixNano() {
		return false
	}
	s.StartedAt = at.UnixNano()
	return true
}

// untold is an heir that kubelet may not know of yet.
type untold struct {
	heir
	heard heard
	round bool // that of a moment in which sandboxes had been listed and containers not yet
	since time.Time
}

// early reports whether a list that is asked for now may belong to a round that began before the reveal.
func (u untold) early() bool {
	return u.round && u.heard == nothing && time.Since(u.since) < roundPatience
}

// roundPatience bounds how long kubelet takes from listing sandboxes to listing containers.
const roundPatience = 5 * time.Second

// heard is how far kubelet has come in the calls by which it learns of an heir, see [View.told].
type heard int

const (
	nothing         heard = iota
	sandboxesListed       // since the reveal
	listed                // since then, with the heir in it
	inspected             // its sandbox's status has been asked for since then
)

// told notes that an answer lists these containers, in whatever state they are. Kubelet lists first and then asks for the
// status of each container that it was told of. One that has been told of the incumbent alone would take its exit for that of
// the slot, and start the container once more or, where it is never restarted, give up the pod. So the incumbent's
// own status goes on saying that it runs until kubelet has looked at the pod as PLEG does, from the beginning: sandboxes are listed,
// a list shows the successor, the sandbox's status is asked for, then the successor's. A list or a status alone may be those of
// another part of kubelet's, in the middle of all that PLEG asks by an older list: the log manager asks for the status of
// all that run, without a word of sandboxes. Kubelet asks for the newest container of a slot first, or in the order of
// the list, which is changed here to be that.
//
// A round of PLEG's that had listed its sandboxes when the reveal came lists containers as they were before it, see
// [look.hideUntold]: what it then asks of the incumbent is answered that way, too, and PLEG looks again only at a pod whose list has
// changed.
func (v *View) told(list []*runtimeapi.Container) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for turned := true; turned; { // of a chain of three, one that is in its place may have to move again
		turned = false
		for incumbent, u := range v.untold {
			i := slices.IndexFunc(list, func(c *runtimeapi.Container) bool { return c.GetId() == u.id })
			if i < 0 {
				continue
			}
			if j := slices.IndexFunc(list[:i], func(c *runtimeapi.Container) bool { return c.GetId() == incumbent }); j >= 0 {
				list[i], list[j] = list[j], list[i]
				turned = true
			}
			v.hearLocked(incumbent, listed)
		}
	}
}

// hearLocked notes a call of kubelet's, if it comes after those that it has to come after.
func (v *View) hearLocked(incumbent string, call heard) {
	if u := v.untold[incumbent]; u.heard == call-1 {
		u.heard = call
		v.untold[incumbent] = u
	}
}

// listsSandboxes notes that the sandboxes are being listed.
func (v *View) listsSandboxes() {
	v.round.Store(true)
	if !v.Active() {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for incumbent := range v.untold {
		v.hearLocked(incumbent, sandboxesListed)
	}
}

// inspect notes that the status of the sandbox is being asked for.
func (v *View) inspect(sandbox string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for incumbent, u := range v.untold {
		if u.sandbox == sandbox || u.sandbox == "" {
			v.hearLocked(incumbent, inspected)
		}
	}
}

// asked notes that the status of the container has been asked for.
func (v *View) asked(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tellLocked(func(_ string, u untold) bool { return u.heard == inspected && u.id == id })
}

// tellLocked ends that for those that is says.
func (v *View) tellLocked(is func(incumbent string, u untold) bool) {
	for incumbent, u := range v.untold {
		if is(incumbent, u) {
			delete(v.untold, incumbent)
			v.active.Add(-1)
		}
	}
}

// forgetSandbox drops what is remembered of the containers of a sandbox that has been removed with them.
func (v *View) forgetSandbox(id string) {
	if id == "" {
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	maps.DeleteFunc(v.heirs, func(_ string, h *heir) bool { return strings.HasPrefix(h.sandbox, id) })
	v.tellLocked(func(_ string, u untold) bool { return strings.HasPrefix(u.sandbox, id) })
}

// untoldHeir returns the container that has replaced this one, if kubelet does not go by that yet, or "".
func (v *View) untoldHeir(id string) string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.untold[id].id
}

// verdict is how one container is shown.
type verdict int

const (
	shown verdict = iota
	hidden
	masked
)

// judge returns how the container is shown now, for calls that name one; id must not be a prefix.
func (v *View) judge(id string) verdict {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.verdictLocked(id)
}

func (v *View) verdictLocked(id string) verdict {
	c := v.ids[id]
	switch {
	case c == nil || !c.speaking:
		return shown
	case c.successor == id:
		return hidden
	default:
		return masked
	}
}

// look is how one call sees the containers: whatever was hidden or masked at any moment
// since the call began stays so until it is answered. The runtime answers as of some moment in
// between, so neither the view before nor the one after is enough; and an answer that shows one
// container of a slot before a reveal and the other after it could show the exited one alone, which
// is the end of a pod that is never restarted.
type look struct {
	view   *View
	did    *decided
	tokens map[string]struct{} // guarded by view.mu
	ids    map[string]verdict  // guarded by view.mu
}

// look begins a call, whose decisions are noted in did; end must be called when it has been answered.
func (v *View) look(did *decided) *look {
	v.mu.Lock()
	defer v.mu.Unlock()
	l := &look{view: v, did: did, tokens: make(map[string]struct{}, len(v.tokens)), ids: make(map[string]verdict, len(v.ids))}
	for t := range v.tokens {
		l.tokens[t] = struct{}{}
	}
	for id := range v.ids {
		if how := v.verdictLocked(id); how != shown {
			l.ids[id] = how
		}
	}
	v.looks[l] = struct{}{}
	return l
}

// hideUntold makes a list show a slot as it was before its reveal, if the list belongs to a round that began then. A list of all
// containers ends the round.
func (l *look) hideUntold(all bool) {
	l.view.mu.Lock()
	defer l.view.mu.Unlock()
	if all {
		l.view.round.Store(false)
	}
	for incumbent, u := range l.view.untold {
		if !u.early() {
			continue
		}
		for id := u.id; id != ""; id = l.view.untold[id].id { // and who has taken its place since
			l.ids[id] = hidden
		}
		if l.ids[incumbent] != hidden { // it may have taken another's place itself
			l.ids[incumbent] = masked
		}
	}
}

func (l *look) end() {
	l.view.mu.Lock()
	defer l.view.mu.Unlock()
	delete(l.view.looks, l)
}

// blank reports whether the look changes nothing so far.
func (l *look) blank() bool {
	l.view.mu.RLock()
	defer l.view.mu.RUnlock()
	return len(l.tokens) == 0 && len(l.ids) == 0 && l.view.known == nil
}

// judge returns how the container is shown in this call's answer. annotations may be nil
// where the answer has none; then only the ID counts.
func (l *look) judge(id string, annotations map[string]string) verdict {
	l.view.mu.RLock()
	defer l.view.mu.RUnlock()
	if t := annotations[StagedAnnotation]; t != "" {
		if _, ok := l.tokens[t]; ok || l.view.suspectLocked(t) {
			l.did.add(didHide)
			return hidden
		}
	}
	how := l.ids[id]
	switch how {
	case hidden:
		l.did.add(didHide)
	case masked:
		l.did.add(didMask)
	}
	return how
}

// noteLocked tells the calls in flight what has become hidden or masked.
func (v *View) noteLocked(c *Claim, id string, how verdict) {
	if !c.speaking {
		return
	}
	for l := range v.looks {
		if _, known := l.ids[id]; !known {
			l.ids[id] = how
		}
	}
}

// byContainer finds the claim whose incumbent or successor the ID names, which may be a
// unique prefix as containerd accepts them, and returns the full ID. A stray's claim is found by the stray only: the
// container beside it is that of whoever holds the slot.
func (v *View) byContainer(id string) (*Claim, string) {
	if id == "" {
		return nil, ""
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	var found *Claim
	full := ""
	is := func(c *Claim, known string) bool {
		if known != "" && strings.HasPrefix(known, id) {
			found, full = c, known
		}
		return known == id
	}
	for c := range v.strays {
		if is(c, c.successor) {
			return c, id
		}
	}
	for _, c := range v.claims {
		if is(c, c.incumbent) || is(c, c.successor) {
			return c, id
		}
	}
	return found, full
}

// bySandbox returns the claims on slots of the sandbox.
func (v *View) bySandbox(id string) []*Claim {
	if id == "" {
		return nil
	}
	v.mu.RLock()
	defer v.mu.RUnlock()
	var out []*Claim
	for _, c := range v.claims {
		if c.sandbox != "" && strings.HasPrefix(c.sandbox, id) {
			out = append(out, c)
		}
	}
	return out
}

// successorOf returns the successor's ID, if c has one that is still hidden.
func (v *View) successorOf(c *Claim) string {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return c.successor
}

// yieldPatience bounds how long a call of kubelet's waits for an operation to
// get out of the way after the runtime has done what kubelet asked: the operation
// then only stops and removes its successor, which the runtime does within the grace.
const yieldPatience = 2 * time.Minute

// stopping notes that a caller stops the container or sandbox, until the returned function is called.
func (v *View) stopping(id string) (done func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stops[id]++
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.stops[id]--; v.stops[id] == 0 {
			delete(v.stops, id)
		}
	}
}

// Stopping reports whether a stop of the incumbent or its sandbox, made by
// someone else, is under way. Together with [Claim.Yielded], which covers stops that begin after
// [Claim.Bind], it leaves no stop unnoticed.
func (c *Claim) Stopping() bool {
	c.view.mu.RLock()
	defer c.view.mu.RUnlock()
	return c.stoppingLocked(maps.Keys(c.view.stops)) || c.stoppingLocked(slices.Values(c.view.elsewhere))
}

func (c *Claim) stoppingLocked(ids iter.Seq[string]) bool {
	for id := range ids {
		if id != "" && (strings.HasPrefix(c.incumbent, id) || strings.HasPrefix(c.sandbox, id)) {
			return true
		}
	}
	return false
}
