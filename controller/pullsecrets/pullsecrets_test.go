// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package pullsecrets

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
)

// TestOf: a node gets the credentials for the image and no others, and none for a pod that it has
// created.
func TestOf(t *testing.T) {
	meta := metav1.ObjectMeta{Namespace: "ns", Name: "keys"}
	from := fake.NewClientBuilder().WithObjects(&corev1.Secret{
		ObjectMeta: meta, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(
			`{"auths":{"r:5000":{"username":"host"},"r:5000/team":{"username":"path"},` +
				`"r":{"username":"port"},"*.example":{"username":"glob"},"quay.io":{"username":"other"}}}`)},
	}, &corev1.ServiceAccount{
		ObjectMeta:       metav1.ObjectMeta{Namespace: "ns", Name: DefaultAccount},
		ImagePullSecrets: []corev1.LocalObjectReference{{Name: "keys"}},
	}).Build()
	mirror := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns",
		Annotations: map[string]string{corev1.MirrorPodAnnotationKey: "x"}}}
	users := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns"}}
	env := &opsv1.Environment{ImageVolumes: []*opsv1.ImageVolume{{Reference: "a.example/data"},
		{Reference: "quay.io/data", PullPolicy: opsv1.PullPolicy_PULL_POLICY_NEVER}}}
	const present, never = opsv1.PullPolicy_PULL_POLICY_IF_NOT_PRESENT, opsv1.PullPolicy_PULL_POLICY_NEVER
	for _, tt := range []struct {
		name   string
		pod    *corev1.Pod
		images []string
		want   []string
	}{
		{"the registry's and the path's", users, Pulled("r:5000/team/app:1", present, nil), []string{"path", "host"}},
		{"another path", users, Pulled("r:5000/app", present, nil), []string{"host"}},
		{"no port", users, Pulled("r/app", present, nil), nil}, // docker.io/r/app
		{"a pattern", users, Pulled("b.example/app", present, nil), []string{"glob"}},
		{"images of volumes too", users, Pulled("r:5000/app", present, env), []string{"host", "glob"}},
		{"what is never pulled", users, Pulled("r:5000/app", never, env), []string{"glob"}},
		{"no registry of theirs", users, Pulled("nginx", present, nil), nil},
		{"no image", users, nil, nil},
		{"no reference", users, []string{"::"}, nil},
		{"a node's own pod", mirror, Pulled("r:5000/app", present, nil), nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			found, err := Of(t.Context(), from, tt.pod, tt.images)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, c := range found {
				got = append(got, c.GetUsername())
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}

// TestNoCredentials has secrets that can be read and are empty, as docker login leaves them with a
// store.
func TestNoCredentials(t *testing.T) {
	secret := func(name, config string) *corev1.Secret {
		return &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Type: corev1.SecretTypeDockerConfigJson,
			Data: map[string][]byte{corev1.DockerConfigJsonKey: []byte(config)},
		}
	}
	for _, tt := range []struct {
		name, config, wrong string
		has                 bool
	}{
		{"store", `{"auths":{"quay.io":{}},"credsStore":"desktop"}`, "credsStore", false},
		{"helper", `{"credHelpers":{"quay.io":"ecr-login"}}`, "credHelpers", false},
		{"empty entry", `{"auths":{"quay.io":{}}}`, "names no registry, or none with", false},
		{"no entry", `{"auths":{}}`, "names no registry, or none with", false},
		{"nothing", `{}`, "names no registry, or none with", false},
		{"another registry's", `{"auths":{"r.io":{"username":"u"}}}`, "", false},
		{"one of two", `{"auths":{"quay.io":{"auth":"dTpw"},"r.io":{}},"credsStore":"desktop"}`, "", true},
		{"token", `{"auths":{"quay.io":{"identitytoken":"x"}}}`, "", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			from := fake.NewClientBuilder().WithObjects(secret("key", tt.config)).Build()
			k, err := Read(t.Context(), from, "ns", DefaultAccount, []string{"key"}, "pullSecrets")
			if err != nil {
				t.Fatal(err)
			}
			wrong := strings.Join(k.Wrong, "; ")
			if (wrong == "") != (tt.wrong == "") || !strings.Contains(wrong, tt.wrong) || wrong != "" &&
				!strings.HasPrefix(wrong, "secret key of pullSecrets has no credentials: ") {
				t.Errorf("wrong: %q", wrong)
			}
			if k.Has("quay.io/app") != tt.has {
				t.Errorf("credentials for the image: %v", !tt.has)
			}
		})
	}
}
