// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package admission

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"

	"github.com/sirupsen/logrus"
	admissionv1 "k8s.io/api/admission/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	appsv1alpha1 "github.com/cri-proxy/cri-proxy/api/apps/v1alpha1"
	"github.com/cri-proxy/cri-proxy/api/apps/v1beta1"
	inplace "github.com/cri-proxy/cri-proxy/api/inplace/v1alpha1"
	"github.com/cri-proxy/cri-proxy/controller/apierror"
	"github.com/cri-proxy/cri-proxy/controller/imagepull/spec"
	"github.com/cri-proxy/cri-proxy/controller/recreate/accept"
	"github.com/cri-proxy/cri-proxy/controller/rollout/check"
)

// Paths of the webhooks, as the webhook configurations in deploy name them. Image jobs come as
// v1beta1 and requests as v1alpha1, in whatever version the user has sent them: the API server
// converts them.
const (
	PathDefaultRecreate  = "/default-containerrecreaterequest"
	PathValidateRecreate = "/validate-containerrecreaterequest"
	PathValidateJob      = "/validate-imagepulljob"
	PathValidateList     = "/validate-imagelistpulljob"
	PathValidateRollout  = "/validate-inplacerollout"
)

// mux registers handlers; a webhook.Server does.
type mux interface {
	Register(path string, hook http.Handler)
}

// Register adds the webhooks to a server. from must read past the cache: a replica that does not
// lead caches no pods, and the webhooks must not refuse a user for what was true a moment ago.
func Register(server mux, scheme *runtime.Scheme, from client.Reader, log logrus.FieldLogger) {
	w := &webhooks{from: from, log: log}
	for path, handler := range map[string]admission.Handler{
		PathDefaultRecreate:  w.fill(scheme),
		PathValidateRecreate: admission.WithValidator(scheme, w.recreate()).Handler,
		PathValidateJob:      admission.WithValidator(scheme, w.job()).Handler,
		PathValidateList:     admission.WithValidator(scheme, w.list()).Handler,
		PathValidateRollout:  admission.WithValidator(scheme, w.rollout()).Handler,
	} {
		server.Register(path, &admission.Webhook{Handler: w.guard(path, handler)})
	}
}

// webhooks holds what the webhooks share.
type webhooks struct {
	from client.Reader
	log  logrus.FieldLogger
}

// guard lets an object through when a check panics: a bug of ours must not keep users from working.
func (w *webhooks) guard(path string, h admission.Handler) admission.Handler {
	return admission.HandlerFunc(func(ctx context.Context, req admission.Request) (resp admission.Response) {
		defer func() {
			if why := recover(); why != nil {
				w.log.WithFields(logrus.Fields{"path": path, "object": req.Namespace + "/" + req.Name}).
					Errorf("a check panicked: %v", why)
				resp = admission.Allowed("").
					WithWarnings("not checked because of an error in cri-controller; the object's status will say " +
						"whether it " +
						"can be carried out")
			}
		}()
		return h.Handle(ctx, req)
	})
}

// fill completes new requests, and restores what a change has removed of that. It is best effort.
// The reconciler does without it, and if fill cannot read a request, the schema refuses the request
// with a better text. fill itself refuses only a read-only field that the user has set. The patch
// has only the fields that fill sets: a whole object of our types would add fields that the user
// has not set.
func (w *webhooks) fill(scheme *runtime.Scheme) admission.Handler {
	decoder := admission.NewDecoder(scheme)
	return admission.HandlerFunc(func(ctx context.Context, req admission.Request) admission.Response {
		var crr appsv1alpha1.ContainerRecreateRequest
		if err := decoder.Decode(req, &crr); err != nil {
			return admission.Allowed("")
		}
		sent := crr.DeepCopy()
		err := w.fillOne(ctx, decoder, req, &crr)
		var why *apierror.SpecError
		if errors.As(err, &why) {
			return admission.Errored(http.StatusBadRequest, why)
		}
		if err != nil {
			w.log.WithError(err).WithField("request", req.Namespace+"/"+req.Name).Warn("filling in a request")
		}
		filled, err := withFilled(req.Object.Raw, sent, &crr)
		if err != nil {
			w.log.WithError(err).WithField("request", req.Namespace+"/"+req.Name).Warn("filling in a request")
			return admission.Allowed("")
		}
		return admission.PatchResponseFromRaw(req.Object.Raw, filled)
	})
}

func (w *webhooks) fillOne(
	ctx context.Context, decoder admission.Decoder, req admission.Request, crr *appsv1alpha1.ContainerRecreateRequest,
) error {
	if req.Operation != admissionv1.Update {
		return accept.Fill(ctx, w.from, crr)
	}
	var before appsv1alpha1.ContainerRecreateRequest
	if err := decoder.DecodeRaw(req.OldObject, &before); err != nil {
		return err
	}
	return accept.Refill(ctx, w.from, &before, crr)
}

// withFilled returns the object as it was sent, with the labels, annotations and fields of the spec
// that fill has set.
func withFilled(raw []byte, sent, filled *appsv1alpha1.ContainerRecreateRequest) ([]byte, error) {
	var object unstructured.Unstructured
	if err := object.UnmarshalJSON(raw); err != nil {
		return nil, err
	}
	if !maps.Equal(sent.Labels, filled.Labels) {
		object.SetLabels(filled.Labels)
	}
	if !maps.Equal(sent.Annotations, filled.Annotations) {
		object.SetAnnotations(filled.Annotations)
	}
	all, err := runtime.DefaultUnstructuredConverter.ToUnstructured(filled)
	if err != nil {
		return nil, err
	}
	grace := []string{"spec", "strategy", "terminationGracePeriodSeconds"}
	if err := add(object.Object, all, grace...); err != nil {
		return nil, err
	}
	containers, _, err := unstructured.NestedSlice(object.Object, "spec", "containers")
	if err != nil {
		return nil, err
	}
	with, _, err := unstructured.NestedSlice(all, "spec", "containers")
	if err != nil {
		return nil, err
	}
	for i := range min(len(containers), len(with)) {
		to, isMap := containers[i].(map[string]any)
		from, isMapToo := with[i].(map[string]any)
		if !isMap || !isMapToo {
			continue
		}
		for _, field := range []string{"statusContext", "preStop", "ports"} {
			if err := add(to, from, field); err != nil {
				return nil, err
			}
		}
	}
	if len(containers) > 0 {
		if err := unstructured.SetNestedSlice(object.Object, containers, "spec", "containers"); err != nil {
			return nil, err
		}
	}
	return object.MarshalJSON()
}

// add copies one field from one object to another that lacks it.
func add(to, from map[string]any, path ...string) error {
	if _, there, err := unstructured.NestedFieldNoCopy(to, path...); there || err != nil {
		return err
	}
	value, there, err := unstructured.NestedFieldCopy(from, path...)
	if !there || err != nil {
		return err
	}
	return unstructured.SetNestedField(to, value, path...)
}

func (w *webhooks) recreate() admission.Validator[*appsv1alpha1.ContainerRecreateRequest] {
	return &validator[*appsv1alpha1.ContainerRecreateRequest]{w,
		func(ctx context.Context, before, crr *appsv1alpha1.ContainerRecreateRequest) ([]string, error) {
			if before != nil {
				return nil, accept.CheckUpdate(before, crr)
			}
			return nil, accept.Check(ctx, w.from, crr)
		}}
}

func (w *webhooks) job() admission.Validator[*v1beta1.ImagePullJob] {
	return &validator[*v1beta1.ImagePullJob]{w,
		func(_ context.Context, _, job *v1beta1.ImagePullJob) ([]string, error) {
			return spec.Check(job)
		}}
}

func (w *webhooks) list() admission.Validator[*v1beta1.ImageListPullJob] {
	return &validator[*v1beta1.ImageListPullJob]{w,
		func(_ context.Context, _, list *v1beta1.ImageListPullJob) ([]string, error) {
			return spec.CheckList(list)
		}}
}

func (w *webhooks) rollout() admission.Validator[*inplace.InPlaceRollout] {
	return &validator[*inplace.InPlaceRollout]{w,
		func(ctx context.Context, before, r *inplace.InPlaceRollout) ([]string, error) {
			return check.Rollout(ctx, w.from, before, r)
		}}
}

// object is an object of one of our kinds.
type object interface {
	comparable
	client.Object
}

// validator is an admission.Validator for one kind.
type validator[T object] struct {
	*webhooks
	// check gets the object as it will be stored and, unless the object is new, as it is now.
	check func(ctx context.Context, before, after T) (warnings []string, err error)
}

// ValidateCreate implements admission.Validator.
func (v *validator[T]) ValidateCreate(ctx context.Context, o T) (admission.Warnings, error) {
	var none T
	return v.answer(ctx, none, o)
}

// ValidateUpdate implements admission.Validator. It lets through any change of an object that is
// being deleted.
func (v *validator[T]) ValidateUpdate(ctx context.Context, before, after T) (admission.Warnings, error) {
	if after.GetDeletionTimestamp() != nil {
		return nil, nil
	}
	return v.answer(ctx, before, after)
}

// ValidateDelete implements admission.Validator. It never refuses.
func (v *validator[T]) ValidateDelete(context.Context, T) (admission.Warnings, error) {
	return nil, nil
}

// answer refuses what the user can correct, and lets through what it could not check.
func (v *validator[T]) answer(ctx context.Context, before, after T) (admission.Warnings, error) {
	warnings, err := v.check(ctx, before, after)
	var why *apierror.SpecError
	switch {
	case errors.As(err, &why) && why.Immutable:
		return nil, &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure,
			Code:   http.StatusForbidden,
			Reason: metav1.StatusReasonForbidden, Message: why.Message}}
	case errors.As(err, &why):
		return nil, apierrors.NewBadRequest(why.Message)
	case err != nil:
		v.log.WithError(err).WithField("object", client.ObjectKeyFromObject(after).String()).
			Warn("a new object could not be checked")
		return append(warnings,
			fmt.Sprintf("not checked (%v); the object's status will say whether it can be carried out",
				err)), nil
	}
	return warnings, nil
}
