// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package admission tells users at once what the reconcilers would only find later: its webhooks
// refuse requests, jobs and rollouts that cannot be carried out, with the reconcilers' own checks.
// Nothing depends on them. A webhook that cannot be asked, or cannot find out, lets the object
// through, and the reconciler says what is wrong in the object's status.
package admission
