// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package spec

import (
	"errors"
	"fmt"

	"github.com/distribution/reference"

	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
)

// listErrorsMax is how many images of a list an error complains of.
const listErrorsMax = 10

// Check says whether a job can be carried out, by the checks that the reconciler makes when it
// takes the job up. The error is an *apierror.SpecError. The warnings are about values that are
// accepted and may not be meant.
func Check(job *v1beta1.ImagePullJob) (warnings []string, err error) {
	if _, err := Of(job); err != nil {
		return nil, err
	}
	if err := checkSelectors(&job.Spec.ImagePullJobTemplate); err != nil {
		return nil, err
	}
	return warningsOf(&job.Spec.ImagePullJobTemplate), nil
}

// CheckList is Check for each job that a list would make.
func CheckList(list *v1beta1.ImageListPullJob) (warnings []string, err error) {
	var wrongs []error
	seen := map[string]string{}
	for _, image := range list.Spec.Images {
		var jobWarnings []string
		if jobWarnings, err = Check(Child(list, "", image)); err != nil {
			if len(wrongs) < listErrorsMax && (len(wrongs) == 0 || wrongs[len(wrongs)-1].Error() != err.Error()) {
				wrongs = append(wrongs, err)
			}
			continue
		}
		if len(seen) == 0 {
			warnings = jobWarnings
		}
		named, err := reference.ParseDockerRef(image)
		if err != nil {
			return nil, err // it was parsed before
		}
		if other := seen[named.String()]; other != "" {
			warnings = append(warnings, fmt.Sprintf(
				"%s and %s are the same image: it is pulled once on each node, and asked for twice", other, image))
		}
		seen[named.String()] = image
	}
	if err := errors.Join(wrongs...); err != nil {
		return nil, &apierror.SpecError{Message: err.Error()}
	}
	return warnings, nil
}

// checkSelectors says whether the selectors can be read. The error is an *apierror.SpecError.
func checkSelectors(t *v1beta1.ImagePullJobTemplate) error {
	if s := t.Selector; s != nil {
		if _, err := selectorOf("spec.selector", &s.LabelSelector); err != nil {
			return err
		}
	}
	if s := t.PodSelector; s != nil {
		if _, err := selectorOf("spec.podSelector", &s.LabelSelector); err != nil {
			return err
		}
	}
	return nil
}

// warningsOf are about values that OpenKruise accepts, and say how they are read here.
func warningsOf(t *v1beta1.ImagePullJobTemplate) []string {
	var warnings []string
	warn := func(format string, args ...any) { warnings = append(warnings, fmt.Sprintf(format, args...)) }
	if p := t.ImagePullPolicy; p != "" && p != v1beta1.PullAlways && p != v1beta1.PullIfNotPresent {
		warn("spec.imagePullPolicy %q is taken for Always: only IfNotPresent and Always are known", p)
	}
	if p := t.PullPolicy; p != nil {
		if n := p.BackoffLimit; n != nil && *n < 0 {
			warn("spec.pullPolicy.backoffLimit %d is taken for %d", *n, opsv1.DefaultAttempts-1)
		}
		if n := p.TimeoutSeconds; n != nil && *n <= 0 {
			warn("spec.pullPolicy.timeoutSeconds %d is taken for %d", *n, int(opsv1.DefaultAttemptTimeout.Seconds()))
		}
	}
	return warnings
}
