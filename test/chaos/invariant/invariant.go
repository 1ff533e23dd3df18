// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package invariant

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// StaticSpec is the one file that cri-proxy leaves in the CDI directory for good.
const StaticSpec = "cri-proxy.json"

// Container is one container of the slot as a list shows it.
type Container struct {
	ID      string
	Sandbox string
	Attempt uint32
	State   runtimeapi.ContainerState
	// Image is the one that it was made of, as the pod's spec has it.
	Image string
}

func (c Container) String() string {
	return fmt.Sprintf("%d:%s:%s", c.Attempt, strings.TrimPrefix(c.State.String(), "CONTAINER_"), short(c.ID))
}

// Status is a container in the API server's pod status.
type Status struct {
	ID       string // without scheme
	Restarts int32
	Running  bool
}

// Facts is what was found on the node and in the API server at one moment.
type Facts struct {
	// PodUID, PodIP and Phase are the API server's.
	PodUID, PodIP, Phase string
	// Runtime and Proxy are the slot's containers, as the runtime lists them and as the proxy shows
	// them.
	Runtime, Proxy []Container
	// API is the slot in the pod's status, Neighbours are the other containers of this pod and of
	// the witness pods, by pod/name.
	API        Status
	Neighbours map[string]Status

	// Gates is what the state directory's gates/ holds, CDI the file names in the CDI directory,
	// Fifos the named pipes below the state directory.
	Gates, CDI, Fifos []string
	// Processes are the pod's processes that no running container accounts for, or that a runtime
	// left half-started.
	Processes []string
	// Leases and Mounts are the runtime's.
	Leases, Mounts []string
	// Logs are the attempts of which there is a log file, Links the container IDs that log
	// shippers' links name.
	Logs  []uint32
	Links []string

	// Starts is how often the application has been started in the slot, Overlaps how often it found
	// another instance alive.
	Starts, Overlaps int
	// Created are the attempts that kubelet itself created in the slot.
	Created []uint32

	// Operation is the restart, nil before; Again the answer to the same command sent again. Of an
	// upgrade it is the last operation that the pod was changed with, nil if it was not.
	Operation, Again *opsv1.Operation

	// Image is the slot's in the pod's spec, Rollout the reason for which the rollout of an upgrade
	// ended.
	Image, Rollout string
	// Active are the operations on the node that have not ended, Pins what keeps images on it.
	Active, Pins []string
}

// Outcome is how a restart may end.
type Outcome int

const (
	// Either means that whether it succeeds depends on the moment; it must be truthful.
	Either Outcome = iota
	// Succeeds in spite of the fault.
	Succeeds
	// Fails and leaves a container that runs.
	Fails
)

// String returns the outcome as tables show it.
func (o Outcome) String() string { return [...]string{"either", "succeeds", "fails"}[o] }

// Expect is what is asked of one case beyond what always holds.
type Expect struct {
	Outcome Outcome
	// Overlap allows two instances at a time: order StartFirst.
	Overlap bool
	// Untouched asks that a failure left the incumbent running.
	Untouched bool
	// Image is what an upgrade changes the slot to.
	Image string
	// Lost is set where the node has forgotten the operation: nobody says how it ended.
	Lost bool
}

// Check returns what does not hold, in sentences; none is what a test wants. before is from before
// the command.
func Check(before, after *Facts, want Expect) []string {
	c := &check{before: before, after: after, want: want}
	c.slot()
	c.pod()
	c.leaks()
	c.operation()
	c.application()
	c.neighbours()
	return c.bad
}

type check struct {
	before, after *Facts
	want          Expect
	bad           []string
}

func (c *check) add(format string, args ...any) { c.bad = append(c.bad, fmt.Sprintf(format, args...)) }

// running returns the only running container of the slot, nil if there is none or more than one.
func running(list []Container) *Container {
	var found *Container
	for i := range list {
		if list[i].State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if found != nil {
			return nil
		}
		found = &list[i]
	}
	return found
}

// slot: one running container, the same for everybody, and nothing hidden.
func (c *check) slot() {
	live := running(c.after.Runtime)
	if live == nil {
		c.add("the runtime has not exactly one running container of the slot: %v", c.after.Runtime)
	}
	for _, x := range c.after.Runtime {
		if x.State == runtimeapi.ContainerState_CONTAINER_CREATED ||
			x.State == runtimeapi.ContainerState_CONTAINER_UNKNOWN {
			c.add("a container was left %v", x)
		}
	}
	byID := func(a, b Container) int { return strings.Compare(a.ID, b.ID) }
	direct, proxied := slices.SortedFunc(slices.Values(c.after.Runtime), byID),
		slices.SortedFunc(slices.Values(c.after.Proxy), byID)
	if !slices.Equal(direct, proxied) {
		c.add("the proxy shows %v, the runtime has %v", proxied, direct)
	}
	if live != nil && (c.after.API.ID != live.ID || !c.after.API.Running) {
		c.add("the pod's status has %+v, %v runs", c.after.API, *live)
	}
	if live != nil && c.after.API.ID == live.ID &&
		c.after.API.Restarts != int32(live.Attempt) { //nolint:gosec // attempts are small numbers
		c.add("the pod's status counts %d restarts, attempt %d runs", c.after.API.Restarts, live.Attempt)
	}
}

// pod: the same one, in the same sandbox.
func (c *check) pod() {
	if c.after.PodUID != c.before.PodUID || c.after.PodIP != c.before.PodIP {
		c.add("pod %s at %s became %s at %s", c.before.PodUID, c.before.PodIP, c.after.PodUID, c.after.PodIP)
	}
	if c.after.Phase != "Running" {
		c.add("the pod's phase is %q", c.after.Phase)
	}
	for _, x := range c.after.Runtime {
		if len(c.before.Runtime) > 0 && x.Sandbox != c.before.Runtime[0].Sandbox {
			c.add("container %v is in sandbox %s, was %s", x, short(x.Sandbox), short(c.before.Runtime[0].Sandbox))
		}
	}
}

func (c *check) leaks() {
	for what, found := range map[string][]string{"gates": c.after.Gates, "named pipes": c.after.Fifos,
		"processes": c.after.Processes} {
		if len(found) > 0 {
			c.add("%s are left: %q", what, found)
		}
	}
	for _, f := range c.after.CDI {
		if f != StaticSpec {
			c.add("CDI file %s is left", f)
		}
	}
	if more := without(c.after.Leases, c.before.Leases); len(more) > 0 {
		c.add("leases are left: %q", more)
	}
	live := running(c.after.Runtime)
	for _, m := range without(c.after.Mounts, c.before.Mounts) {
		if live == nil || !strings.Contains(m, live.ID) {
			c.add("mount %s is left", m)
		}
	}
	known := map[string]bool{}
	attempts := map[uint32]bool{}
	for _, x := range c.after.Runtime {
		known[x.ID], attempts[x.Attempt] = true, true
		if x.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		for _, m := range c.after.Mounts {
			if strings.Contains(m, x.ID) {
				c.add("mount %s of container %v is left", m, x)
			}
		}
	}
	for _, n := range c.after.Logs {
		if c.want.Overlap && n == c.attempt() {
			continue // what a successor said that ended too early is kept: the operation's message names the file
		}
		if !attempts[n] {
			c.add("a log of attempt %d is left, which is no container", n)
		}
	}
	for _, id := range c.after.Links {
		if !known[id] {
			c.add("a log link of %s is left, which is no container", short(id))
		}
	}
}

// attempt is the successor's, with or without an operation that is known.
func (c *check) attempt() uint32 {
	if len(c.after.Operation.GetContainers()) != 1 {
		if was := running(c.before.Runtime); was != nil {
			return was.Attempt + 1
		}
		return 0
	}
	return c.after.Operation.GetContainers()[0].GetAttempt()
}

// operation: it has ended, and says what is.
func (c *check) operation() {
	op := c.after.Operation
	if c.want.Lost {
		if op != nil {
			c.add("the operation is known although its journal is gone: %v", op)
		}
		return
	}
	if op.GetFinishTime() == nil || len(op.GetContainers()) != 1 {
		c.add("the operation has not ended: %v", op)
		return
	}
	if !proto.Equal(op, c.after.Again) {
		c.add("the same command again is answered %v, was %v", c.after.Again, op)
	}
	one, was, live := op.GetContainers()[0], running(c.before.Runtime), running(c.after.Runtime)
	if was == nil || live == nil {
		return // said above
	}
	switch op.GetPhase() {
	case opsv1.Phase_PHASE_SUCCEEDED:
		c.succeeded(one, was, live)
	case opsv1.Phase_PHASE_FAILED:
		c.failed(one, was, live)
	default:
		c.add("the operation ended as %s", op.GetPhase())
	}
}

func (c *check) succeeded(one *opsv1.ContainerOperation, was, live *Container) {
	if c.want.Outcome == Fails {
		c.add("the operation succeeded, it should fail")
	}
	if one.GetPhase() != opsv1.Phase_PHASE_SUCCEEDED || one.GetReason() != "" {
		c.add("the operation succeeded, but the container's part of it did not: %v", one)
	}
	if live.ID == was.ID || live.ID != one.GetSuccessorId() || one.GetIncumbentId() != was.ID ||
		live.Attempt != one.GetAttempt() {
		c.add("%v runs in place of %v, the operation says %s in place of %s, attempt %d", *live, *was,
			short(one.GetSuccessorId()), short(one.GetIncumbentId()), one.GetAttempt())
	}
	if n := len(without(c.after.Created, c.before.Created)); n > 0 {
		c.add("the operation succeeded, but kubelet created attempts %v", c.after.Created)
	}
}

func (c *check) failed(one *opsv1.ContainerOperation, was, live *Container) {
	if c.want.Outcome == Succeeds {
		c.add("the operation failed, it should succeed: %s: %s", one.GetReason(), one.GetMessage())
	}
	if one.GetReason() == "" || one.GetMessage() == "" {
		c.add("the operation failed without saying why: %v", one)
	}
	mine := live.ID != was.ID && !slices.Contains(c.after.Created, live.Attempt)
	if mine {
		c.add("the operation failed (%s), but its successor %v runs in place of %v", one.GetReason(), *live, *was)
	}
	if c.want.Untouched && live.ID != was.ID {
		c.add("the operation failed (%s) and did not leave %v alone: %v runs", one.GetReason(), *was, *live)
	}
	if live.ID != was.ID {
		return
	}
	if len(c.after.Runtime) != len(c.before.Runtime) {
		c.add("the incumbent runs on, but containers came or went: %v", c.after.Runtime)
	}
	if !slices.Equal(c.after.Created, c.before.Created) {
		c.add("the incumbent runs on, but kubelet created attempts %v", c.after.Created)
	}
	if !c.want.Overlap && c.after.Starts != c.before.Starts {
		c.add("the incumbent runs on, but the application was started %d times", c.after.Starts)
	}
}

// application: with StopFirst, one instance at a time.
func (c *check) application() {
	if c.after.Overlaps > 0 && !c.want.Overlap {
		c.add("the application ran twice at a time")
	}
	if live, was := running(c.after.Runtime), running(c.before.Runtime); live != nil && was != nil &&
		live.ID != was.ID && c.after.Starts <= c.before.Starts {
		c.add("another container runs, but the application was not started in it")
	}
}

func (c *check) neighbours() {
	for _, name := range slices.Sorted(maps.Keys(c.before.Neighbours)) {
		if was, is := c.before.Neighbours[name], c.after.Neighbours[name]; is != was {
			c.add("neighbour %s was %+v and is %+v", name, was, is)
		}
	}
}

// without returns the elements of a that are not in b.
func without[T comparable](a, b []T) []T {
	var out []T
	for _, x := range a {
		if !slices.Contains(b, x) {
			out = append(out, x)
		}
	}
	return out
}

func short(id string) string { return id[:min(len(id), 12)] }
