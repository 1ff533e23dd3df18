// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package dryrun

import (
	"context"
	"fmt"
	"maps"

	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/cri-proxy/cri-proxy/controller/objects"
	"github.com/cri-proxy/cri-proxy/controller/rollout/evaluate"
	"github.com/cri-proxy/cri-proxy/controller/rollout/podtemplate"
)

// Template asks the API server what it would make of images in the template of a workload. If
// admission makes other images of them, it asks again, and also what becomes of those: a change
// that ends with another image each time would never end.
//
// alone says that admission may not change other containers: a Deployment and its ReplicaSet must
// end up the same.
func Template(
	ctx context.Context, c client.Client, o client.Object, kind string, images map[string]string, alone bool,
) (evaluate.Rewrites, error) {
	if len(images) == 0 {
		return nil, nil
	}
	first, all, err := ImagesAfter(ctx, c, o, kind, images)
	if err != nil {
		return nil, err
	}
	have := podtemplate.Images(podtemplate.Of(o))
	for _, name := range objects.SortedKeys(all) {
		if alone && images[name] == "" && all[name] != have[name] {
			return nil, &Error{Failure: evaluate.Failure{Reason: evaluate.FailRewritten,
				Message: fmt.Sprintf("admission changes container %s of %s %s from %s to %s as well: let the "+
					"rollout change it, too, to that image",
					name, kind, o.GetName(), have[name], all[name])}}
		}
	}
	if maps.Equal(first, images) {
		return nil, nil
	}
	for _, ask := range []map[string]string{images, first} {
		then, _, err := ImagesAfter(ctx, c, o, kind, ask)
		if err != nil {
			return nil, err
		}
		for _, name := range objects.SortedKeys(images) {
			if then[name] != first[name] {
				return nil, Unsteady(kind+" "+o.GetName(), name, ask[name], first[name], then[name])
			}
		}
	}
	return evaluate.RewritesOf(images, first), nil
}

// ImagesAfter returns what becomes of images when they are written into a template, and all images
// that the template has then.
func ImagesAfter(
	ctx context.Context, c client.Client, o client.Object, kind string, images map[string]string,
) (become, all map[string]string, err error) {
	patch, err := podtemplate.Patch(o, images, nil, nil)
	if err != nil {
		return nil, nil, err
	}
	if all, err = ImagesOfPatch(ctx, c, o, kind, patch); err != nil {
		return nil, nil, err
	}
	become = map[string]string{}
	for name := range images {
		become[name] = all[name]
	}
	return become, all, nil
}

// ImagesOfPatch returns the images that a template would have after a patch of its workload.
func ImagesOfPatch(
	ctx context.Context, c client.Client, o client.Object, kind string, patch []byte,
) (map[string]string, error) {
	answer, ok := o.DeepCopyObject().(client.Object)
	if !ok {
		return nil, fmt.Errorf("%T is no object", o) // never
	}
	if err := c.Patch(ctx, answer, client.RawPatch(types.StrategicMergePatchType, patch),
		client.DryRunAll); err != nil {
		return nil, Denied(err, kind+" "+o.GetName())
	}
	return podtemplate.Images(podtemplate.Of(answer)), nil
}
