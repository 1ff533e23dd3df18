// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package interceptors

import "github.com/cri-proxy/cri-proxy/interceptors/view"

// Names of [view], for the packages that do not import it yet.
type (
	// View is [view.View].
	View = view.View
	// Slot is [view.Slot].
	Slot = view.Slot
	// Claim is [view.Claim].
	Claim = view.Claim
	// Yield is [view.Yield].
	Yield = view.Yield
	// Driver is [view.Driver].
	Driver = view.Driver
	// Carry is [view.State].
	Carry = view.State
)

// StagedAnnotation is [view.StagedAnnotation].
const StagedAnnotation = view.StagedAnnotation

// ErrClaimed is [view.ErrClaimed].
var ErrClaimed = view.ErrClaimed

// NewView is [view.New].
func NewView() *View { return view.New() }
