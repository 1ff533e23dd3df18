// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package imagepull

import (
	"fmt"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
)

// unlimited is in what a node says of an image that it pulls, or has pulled, faster than it was told to: "pulled without the speed limit of
// RATE: WHY", after what else there is to say.
const unlimited = "without the speed limit of "

// limitNotKept is the reason of the condition.
const limitNotKept = "NotKept"

// tellLimit says in the status on how many nodes the speed limit is not kept, and why on one. The caller holds the mutex.
func (u *run) tellLimit(s *v1beta1.ImagePullJobStatus) {
	count, example := 0, ""
	for _, m := range u.members {
		if _, why, ok := strings.Cut(m.op.GetMessage(), unlimited); ok {
			if count++; count == 1 {
				example = fmt.Sprintf("node %s: %s", m.target.node.Name, shorten(unlimited+why))
			}
		}
	}
	if count == 0 {
		meta.RemoveStatusCondition(&s.Conditions, v1beta1.ConditionSpeedLimitKept)
		return
	}
	setCondition(s, v1beta1.ConditionSpeedLimitKept, false, limitNotKept, fmt.Sprintf("%s as fast as it can, %s", counted(count, "node pulls", "nodes pull"), example))
}
