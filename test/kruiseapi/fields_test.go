// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

package kruiseapi

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/cri-proxy/cri-proxy/api/crdtest"
)

// TestFields: the schemas have every field of OpenKruise's types, so that strict decoding takes
// what its clients send, and beyond that only what Added says, so that its clients understand all
// that they are answered but this.
func TestFields(t *testing.T) {
	for _, tt := range []struct{ file, version, kind string }{
		{"containerrecreaterequests", "v1alpha1", "ContainerRecreateRequest"},
		{"containerrecreaterequests", "v1beta1", "ContainerRecreateRequest"},
		{"imagepulljobs", "v1alpha1", "ImagePullJob"}, {"imagepulljobs", "v1beta1", "ImagePullJob"},
		{"imagelistpulljobs", "v1alpha1", "ImageListPullJob"}, {"imagelistpulljobs", "v1beta1", "ImageListPullJob"},
	} {
		t.Run(tt.kind+" "+tt.version, func(t *testing.T) {
			crd := crdtest.Read(t, "../../deploy/crds", "apps.kruise.io_"+tt.file+".yaml")
			i := slices.IndexFunc(crd.Spec.Versions,
				func(v apiextensionsv1.CustomResourceDefinitionVersion) bool { return v.Name == tt.version })
			if i < 0 {
				t.Fatalf("%s is not served", tt.version)
			}
			v := GroupV1alpha1
			v.Version = tt.version
			o, err := NewScheme().New(v.WithKind(tt.kind))
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range []string{"spec", "status"} {
				field, _ := reflect.TypeOf(o).Elem().FieldByName(strings.ToUpper(part[:1]) + part[1:])
				s := crd.Spec.Versions[i].Schema.OpenAPIV3Schema.Properties[part]
				for _, more := range compare(t, part, field.Type, &s) {
					if !Added(v, tt.kind, more) {
						t.Errorf("OpenKruise has no %s", more)
					}
				}
			}
		})
	}
}

var leaves = []reflect.Type{reflect.TypeFor[metav1.Time](), reflect.TypeFor[intstr.IntOrString]()}

// compare reports fields of the type that the schema does not have, and returns those of the schema
// that the type does not have.
func compare(t *testing.T, path string, kind reflect.Type, s *apiextensionsv1.JSONSchemaProps) (more []string) {
	t.Helper()
	for kind.Kind() == reflect.Pointer {
		kind = kind.Elem()
	}
	switch {
	case slices.Contains(leaves, kind):
		return nil
	case kind.Kind() == reflect.Slice:
		if s.Items == nil {
			t.Errorf("%s is no list in the schema", path)
			return nil
		}
		return compare(t, path+"[]", kind.Elem(), s.Items.Schema)
	case kind.Kind() != reflect.Struct:
		return nil
	}
	fields := map[string]reflect.Type{}
	var collect func(reflect.Type)
	collect = func(kind reflect.Type) {
		for i := range kind.NumField() {
			f := kind.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name == "" && f.Anonymous {
				collect(f.Type)
				continue
			}
			fields[name] = f.Type
		}
	}
	collect(kind)
	for name, field := range fields {
		if p, ok := s.Properties[name]; ok {
			more = append(more, compare(t, path+"."+name, field, &p)...)
		} else {
			t.Errorf("the schema has no %s.%s", path, name)
		}
	}
	for name := range s.Properties {
		if fields[name] == nil {
			more = append(more, path+"."+name)
		}
	}
	return more
}
