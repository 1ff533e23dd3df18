// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package environment_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	opsv1 "github.com/cri-proxy/cri-proxy/api/ops/v1"
	"github.com/cri-proxy/cri-proxy/controller/environment"
)

var yes = true

func meta(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }

// objects has the objects that the pods of these tests name.
func objects() []client.Object {
	return []client.Object{
		&corev1.ConfigMap{ObjectMeta: meta("settings"), Data: map[string]string{"b": "2", "a": "1"},
			BinaryData: map[string][]byte{"raw": {0}}},
		&corev1.Secret{ObjectMeta: meta("keys"), Data: map[string][]byte{"token": []byte("t0ken")}},
		&corev1.Service{ObjectMeta: meta("back-end"),
			Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.7", Ports: []corev1.ServicePort{
				{Name: "web-ui", Port: 80}, {Port: 53, Protocol: corev1.ProtocolUDP},
			}}},
		&corev1.Service{ObjectMeta: meta("headless"), Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone}},
		&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "kubernetes"},
			Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1",
				Ports: []corev1.ServicePort{{Name: "https", Port: 443}}},
		},
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "other"},
			Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.9"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"},
			Status: corev1.NodeStatus{Allocatable: corev1.ResourceList{
				corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi"),
			}}},
		&corev1.PersistentVolumeClaim{ObjectMeta: meta("data"),
			Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-1"}},
		&corev1.PersistentVolumeClaim{ObjectMeta: meta("web-scratch"),
			Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv-2"}},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-1"}},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv-2"}, Spec: corev1.PersistentVolumeSpec{
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: "/srv/scratch"}},
		}},
	}
}

func podOf(c corev1.Container) *corev1.Pod {
	c.Name = "app"
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "web", UID: "uid-1", Labels: map[string]string{"tier": "front"},
			Annotations: map[string]string{"note": "hello"},
		},
		Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "runner", Containers: []corev1.Container{c, {
			Name: "other",
			Resources: corev1.ResourceRequirements{
				Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}},
		}}},
		Status: corev1.PodStatus{
			HostIP: "192.0.2.1", HostIPs: []corev1.HostIP{{IP: "192.0.2.1"}, {IP: "2001:db8::1"}},
			PodIP: "10.1.0.5", PodIPs: []corev1.PodIP{{IP: "10.1.0.5"}, {IP: "fd00::5"}},
		},
	}
}

func field(path string) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
}

func limit(container, name string) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{ContainerName: container,
		Resource: name}}
}

func configKey(name, key string, optional *bool) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: optional,
	}}
}

func secretKey(name, key string, optional *bool) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: optional,
	}}
}

func allOf(configMap, secret, prefix string, optional *bool) corev1.EnvFromSource {
	from := corev1.EnvFromSource{Prefix: prefix}
	if configMap != "" {
		from.ConfigMapRef = &corev1.ConfigMapEnvSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: configMap},
			Optional:             optional}
	} else {
		from.SecretRef = &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: secret},
			Optional: optional}
	}
	return from
}

func clientOf(t *testing.T, calls *[]string) client.Reader {
	t.Helper()
	return interceptor.NewClient(fake.NewClientBuilder().WithObjects(objects()...).Build(), interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object,
			opts ...client.GetOption) error {
			*calls = append(*calls, key.Name)
			if key.Name == "forbidden" {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "secrets"}, key.Name,
					errors.New("not allowed"))
			}
			return c.Get(ctx, key, o, opts...)
		},
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			*calls = append(*calls, "list")
			return c.List(ctx, list, opts...)
		},
	})
}

// told shows a variable as NAME=value, a template as NAME~value and a file as NAME@volume/path#key.
func told(variables []*opsv1.Variable) []string {
	var out []string
	for _, v := range variables {
		switch s := v.GetSource().(type) {
		case *opsv1.Variable_Value:
			out = append(out, v.GetName()+"="+string(s.Value))
		case *opsv1.Variable_Template:
			out = append(out, v.GetName()+"~"+s.Template)
		case *opsv1.Variable_File:
			out = append(out, v.GetName()+"@"+s.File.GetVolume()+"/"+s.File.GetPath()+"#"+s.File.GetKey())
		}
	}
	return out
}

func mirror(p *corev1.Pod) { p.Annotations[corev1.MirrorPodAnnotationKey] = "abc" }

func TestVariables(t *testing.T) {
	for _, tc := range []struct {
		name string
		from []corev1.EnvFromSource
		env  []corev1.EnvVar
		pod  func(*corev1.Pod)
		want []string
		err  string // of a MissingError, after kubelet's name for it
	}{
		{name: "values are expanded on the node",
			env:  []corev1.EnvVar{{Name: "A", Value: "x"}, {Name: "B", Value: "$(A)/$(C)"}, {Name: "E"}},
			want: []string{"A~x", "B~$(A)/$(C)", "E~"}},
		{name: "all of a ConfigMap, by name, without its bytes",
			from: []corev1.EnvFromSource{allOf("settings", "", "P_", nil)}, want: []string{"P_a=1", "P_b=2"}},
		{name: "all of a Secret", from: []corev1.EnvFromSource{allOf("", "keys", "", nil)},
			want: []string{"token=t0ken"}},
		{name: "optional ones that are not there",
			from: []corev1.EnvFromSource{allOf("gone", "", "", &yes), allOf("", "gone", "", &yes)}},
		{name: "no ConfigMap", from: []corev1.EnvFromSource{allOf("gone", "", "", nil)},
			err: `configmap "gone" not found`},
		{name: "no Secret", from: []corev1.EnvFromSource{allOf("", "gone", "", nil)}, err: `secret "gone" not found`},
		{name: "keys", env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("settings", "a", nil)},
			{Name: "T", ValueFrom: secretKey("keys", "token", nil)}}, want: []string{"A=1", "T=t0ken"}},
		{name: "optional keys that are not there",
			env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("settings", "z", &yes)},
				{Name: "T", ValueFrom: secretKey("gone", "token", &yes)}}},
		{name: "no key of a ConfigMap", env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("settings", "z", nil)}},
			err: "couldn't find key z in ConfigMap shop/settings"},
		{name: "no key of a Secret", env: []corev1.EnvVar{{Name: "A", ValueFrom: secretKey("keys", "z", nil)}},
			err: "couldn't find key z in Secret shop/keys"},
		{name: "fields", env: []corev1.EnvVar{
			{Name: "NAME", ValueFrom: field("metadata.name")}, {Name: "UID", ValueFrom: field("metadata.uid")},
			{Name: "TIER", ValueFrom: field("metadata.labels['tier']")},
			{Name: "NOTE", ValueFrom: field("metadata.annotations['note']")},
			{Name: "NODE", ValueFrom: field("spec.nodeName")},
			{Name: "SA", ValueFrom: field("spec.serviceAccountName")},
			{Name: "IP", ValueFrom: field("status.podIP")}, {Name: "IPS", ValueFrom: field("status.podIPs")},
			{Name: "HOST", ValueFrom: field("status.hostIP")}, {Name: "HOSTS", ValueFrom: field("status.hostIPs")},
		}, want: []string{
			"NAME=web", "UID=uid-1", "TIER=front", "NOTE=hello", "NODE=n1", "SA=runner", "IP=10.1.0.5",
			"IPS=10.1.0.5,fd00::5",
			"HOST=192.0.2.1", "HOSTS=192.0.2.1,2001:db8::1",
		}},
		{name: "the old name of the node's", env: []corev1.EnvVar{{Name: "NODE", ValueFrom: field("spec.host")}},
			want: []string{"NODE=n1"}},
		{name: "the UID that kubelet gives a static pod",
			env: []corev1.EnvVar{{Name: "UID", ValueFrom: field("metadata.uid")}}, pod: func(p *corev1.Pod) {
				p.Annotations["kubernetes.io/config.hash"], p.Annotations[corev1.MirrorPodAnnotationKey] = "abc", "abc"
			}, want: []string{"UID=abc"}},
		{name: "nothing of a Secret for a pod that a node has made",
			env: []corev1.EnvVar{{Name: "T", ValueFrom: secretKey("keys", "token", nil)}}, pod: mirror,
			err: `secret "keys" is not read for a static pod, which its node has made; put the value in its manifest`},
		{name: "nor all of one, nor a ConfigMap",
			from: []corev1.EnvFromSource{allOf("settings", "", "", nil), allOf("", "keys", "", nil)}, pod: mirror,
			err: `configmap "settings" is not read for a static pod, which its node has made; put the value in its manifest`},
		{name: "nor an optional one", env: []corev1.EnvVar{{Name: "T", ValueFrom: secretKey("keys", "token", &yes)}},
			pod: mirror},
		{name: "another container's limit",
			env:  []corev1.EnvVar{{Name: "M", ValueFrom: limit("other", "limits.memory")}},
			want: []string{"M=67108864"}},
		{name: "no limit: the node's", env: []corev1.EnvVar{{Name: "M", ValueFrom: limit("", "limits.memory")},
			{Name: "C", ValueFrom: limit("other", "limits.cpu")}}, want: []string{"M=8589934592", "C=4"}},
		{name: "no limit: the pod's", env: []corev1.EnvVar{{Name: "M", ValueFrom: limit("", "limits.memory")}},
			pod: func(p *corev1.Pod) {
				p.Spec.Resources = &corev1.ResourceRequirements{
					Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Gi")}}
			}, want: []string{"M=1073741824"}},
		{name: "a resize that waits is not there yet",
			env: []corev1.EnvVar{{Name: "M", ValueFrom: limit("other", "limits.memory")}}, pod: func(p *corev1.Pod) {
				p.Status.Conditions = []corev1.PodCondition{
					{Type: corev1.PodResizePending, Status: corev1.ConditionTrue}}
				p.Status.ContainerStatuses = []corev1.ContainerStatus{
					{Name: "other", Resources: &corev1.ResourceRequirements{
						Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("32Mi")},
					}}}
			}, want: []string{"M=33554432"}},
		{name: "no such container", env: []corev1.EnvVar{{Name: "M", ValueFrom: limit("nobody", "limits.memory")}},
			err: "container nobody not found"},
		{name: "a file's key is the node's to read",
			env: []corev1.EnvVar{{Name: "F", ValueFrom: &corev1.EnvVarSource{FileKeyRef: &corev1.FileKeySelector{
				VolumeName: "v", Path: "d/f.env", Key: "K",
			}}}}, want: []string{"F@v/d/f.env#K"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var calls []string
			pod := podOf(corev1.Container{EnvFrom: tc.from, Env: tc.env})
			if tc.pod != nil {
				tc.pod(pod)
			}
			env, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
			var missing *environment.MissingError
			switch {
			case tc.err != "":
				if !errors.As(err, &missing) || missing.Err.Error() != tc.err {
					t.Fatalf("%v, want %q", err, tc.err)
				}
				if !strings.Contains(err.Error(), "container app") ||
					!strings.Contains(err.Error(), "CreateContainerConfigError") {
					t.Errorf("it does not say what kubelet would: %v", err)
				}
			case err != nil:
				t.Fatal(err)
			case !slices.Equal(told(env.GetVariables()), tc.want):
				t.Errorf("%q\nwant %q", told(env.GetVariables()), tc.want)
			}
		})
	}
}

func TestServices(t *testing.T) {
	kubernetes := []string{
		"KUBERNETES_SERVICE_HOST=10.0.0.1", "KUBERNETES_SERVICE_PORT=443", "KUBERNETES_PORT=tcp://10.0.0.1:443",
		"KUBERNETES_SERVICE_PORT_HTTPS=443",
		"KUBERNETES_PORT_443_TCP=tcp://10.0.0.1:443", "KUBERNETES_PORT_443_TCP_PROTO=tcp",
		"KUBERNETES_PORT_443_TCP_PORT=443",
		"KUBERNETES_PORT_443_TCP_ADDR=10.0.0.1",
	}
	backEnd := []string{
		"BACK_END_SERVICE_HOST=10.0.0.7", "BACK_END_SERVICE_PORT=80", "BACK_END_PORT=tcp://10.0.0.7:80",
		"BACK_END_SERVICE_PORT_WEB_UI=80",
		"BACK_END_PORT_80_TCP=tcp://10.0.0.7:80", "BACK_END_PORT_80_TCP_PROTO=tcp", "BACK_END_PORT_80_TCP_PORT=80",
		"BACK_END_PORT_80_TCP_ADDR=10.0.0.7",
		"BACK_END_PORT_53_UDP=udp://10.0.0.7:53", "BACK_END_PORT_53_UDP_PROTO=udp", "BACK_END_PORT_53_UDP_PORT=53",
		"BACK_END_PORT_53_UDP_ADDR=10.0.0.7",
	}
	no := false
	for _, tc := range []struct {
		name  string
		links *bool
		want  []string
	}{{"of the namespace", nil, slices.Concat(backEnd, kubernetes)}, {"no links", &no, kubernetes}} {
		t.Run(tc.name, func(t *testing.T) {
			var calls []string
			pod := podOf(corev1.Container{})
			pod.Spec.EnableServiceLinks = tc.links
			env, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
			if err != nil || !slices.Equal(told(env.GetServices()), tc.want) {
				t.Errorf("%v\n%q\nwant %q", err, told(env.GetServices()), tc.want)
			}
		})
	}
}

func TestVolumes(t *testing.T) {
	var calls []string
	pod := podOf(corev1.Container{VolumeMounts: []corev1.VolumeMount{
		{Name: "data", MountPath: "/data", SubPath: "one"},
		{Name: "scratch", MountPath: "scratch", SubPathExpr: "$(POD)"},
		{Name: "host", MountPath: "/host", SubPath: "x"},
		{Name: "model", MountPath: "/model"}, {Name: "settings", MountPath: "/etc/a", SubPath: "a"},
		{Name: "settings", MountPath: "/whole"},
	}})
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "data",
			VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{
				ClaimName: "data"}}},
		{Name: "scratch", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/srv"}}},
		{Name: "model",
			VolumeSource: corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: "models:1",
				PullPolicy: corev1.PullAlways}}},
		{Name: "settings", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{}}},
	}
	env, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	want := []*opsv1.SubPath{
		{ContainerPath: "/data", Volume: "data", Path: "one", PersistentVolume: "pv-1"},
		{ContainerPath: "/scratch", Volume: "scratch", Path: "$(POD)", Expand: true, PersistentVolume: "pv-2",
			HostPath: "/srv/scratch"},
		{ContainerPath: "/host", Volume: "host", Path: "x", HostPath: "/srv"},
		{ContainerPath: "/etc/a", Volume: "settings", Path: "a"},
	}
	if !slices.EqualFunc(env.GetSubPaths(), want, func(a, b *opsv1.SubPath) bool { return a.String() == b.String() }) {
		t.Errorf("parts: %v\nwant %v", env.GetSubPaths(), want)
	}
	images := env.GetImageVolumes()
	if len(images) != 1 || images[0].GetContainerPath() != "/model" || images[0].GetReference() != "models:1" ||
		images[0].GetPullPolicy() != opsv1.PullPolicy_PULL_POLICY_ALWAYS {
		t.Errorf("images: %v", images)
	}
}

func TestDeviceVariables(t *testing.T) {
	for name, want := range map[corev1.ResourceName]bool{"vendor.example/gpu": true,
		"hugepages-2Mi": false, "cpu": false,
		"kubernetes.io/x": false} {
		var calls []string
		pod := podOf(
			corev1.Container{
				Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{name: resource.MustParse("1")}}})
		env, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
		if err != nil || env.GetDeviceVariables() != want {
			t.Errorf("%s: %v, %v", name, env.GetDeviceVariables(), err)
		}
	}
}

// TestAskedOnce: for one command, the reader reads the services once, and each object once that
// several containers name.
func TestAskedOnce(t *testing.T) {
	var calls []string
	c := corev1.Container{
		EnvFrom: []corev1.EnvFromSource{allOf("settings", "", "", nil), allOf("gone", "", "", &yes)},
		Env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("settings", "a", nil)},
			{Name: "B", ValueFrom: configKey("gone", "a", &yes)}, {Name: "M", ValueFrom: limit("", "limits.memory")}},
	}
	r := environment.Of(clientOf(t, &calls), podOf(c))
	for range 2 {
		if _, err := r.Container(t.Context(), "app"); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"list", "kubernetes", "settings", "gone", "n1"}; !slices.Equal(calls, want) {
		t.Errorf("asked for %q, want %q", calls, want)
	}
}

// TestTooLarge: the reader does not return an environment with which no process can start. The
// error does not go away by itself.
func TestTooLarge(t *testing.T) {
	for _, tc := range []struct {
		size int
		fits bool
	}{{1 << 20, true}, {2 << 20, false}} {
		var calls []string
		pod := podOf(corev1.Container{Env: []corev1.EnvVar{{Name: "A", Value: strings.Repeat("x", tc.size)}}})
		_, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
		var missing *environment.MissingError
		switch {
		case tc.fits && err != nil:
			t.Error(err)
		case !tc.fits && (!errors.As(err, &missing) || !strings.Contains(err.Error(), "container app") ||
			!strings.Contains(err.Error(), "argument list too long")):
			t.Errorf("with %d bytes: %v", tc.size, err)
		}
	}
}

// TestUnreadable: if the API server does not let us read something, the error is the API server's,
// which may go away. It does not count as missing.
func TestUnreadable(t *testing.T) {
	var calls []string
	pod := podOf(corev1.Container{Env: []corev1.EnvVar{{Name: "A", ValueFrom: secretKey("forbidden", "x", &yes)}}})
	_, err := environment.Of(clientOf(t, &calls), pod).Container(t.Context(), "app")
	var missing *environment.MissingError
	if !apierrors.IsForbidden(err) || errors.As(err, &missing) {
		t.Errorf("%v", err)
	}
	if !strings.Contains(err.Error(), "secret shop/forbidden") {
		t.Errorf("it does not say what: %v", err)
	}
}

func TestReadIsOfTheSamePod(t *testing.T) {
	pod := podOf(corev1.Container{})
	c := fake.NewClientBuilder().WithObjects(pod).Build()
	r, err := environment.Read(t.Context(), c, pod)
	if err != nil {
		t.Fatal(err)
	}
	r.Label("tier", "back")
	if got := r.Pod().Labels["tier"]; got != "back" || pod.Labels["tier"] != "front" {
		t.Errorf("%s, %s", got, pod.Labels["tier"])
	}
	other := pod.DeepCopy()
	other.UID = "uid-2"
	if _, err := environment.Read(t.Context(), c, other); err == nil ||
		!strings.Contains(err.Error(), "another one by now") {
		t.Errorf("%v", err)
	}
	gone := pod.DeepCopy()
	gone.Name = "gone"
	if _, err := environment.Read(t.Context(), c, gone); !apierrors.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}
