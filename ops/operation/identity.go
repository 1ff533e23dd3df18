// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package operation

import (
	"time"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// identity is what never changes of an operation.
type identity struct {
	restart    *opsv1.RestartRequest        // see Command
	upgrade    *opsv1.PrepareUpgradeRequest // see Command
	kind       string
	pod        *opsv1.PodRef
	requester  string
	createTime time.Time
	leftAlone  bool
	rebooted   bool
}

// UID returns the UID that the caller has chosen.
func (i *identity) UID() string { return i.restart.GetUid() }

// Kind is one of the kinds of package opsv1.
func (i *identity) Kind() string { return i.kind }

// Pod is the pod, with its UID.
func (i *identity) Pod() *opsv1.PodRef { return i.pod }

// PodName is the pod's namespace and name.
func (i *identity) PodName() string { return i.pod.GetNamespace() + "/" + i.pod.GetName() }

// Requester is who has asked for the operation, for people.
func (i *identity) Requester() string { return i.requester }

// CreateTime is when the node has accepted the operation.
func (i *identity) CreateTime() time.Time { return i.createTime }

// Request is the restart, or what an upgrade has in common with one; see [Command].
func (i *identity) Request() *opsv1.RestartRequest { return i.restart }

// Upgrade is nil for a restart; see [Command].
func (i *identity) Upgrade() *opsv1.PrepareUpgradeRequest { return i.upgrade }

// IsLeftAlone reports whether this binary does not understand the operation's record: the journal
// keeps the record as it is.
func (i *identity) IsLeftAlone() bool { return i.leftAlone }

// Rebooted reports whether the operation was running when the machine was rebooted.
func (i *identity) Rebooted() bool { return i.rebooted }
