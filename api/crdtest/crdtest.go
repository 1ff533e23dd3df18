// Copyright The cri-proxy Authors.
// SPDX-License-Identifier: Apache-2.0

// Package crdtest reads the custom resource definitions in deploy/crds as the API server does,
// through its own packages.
package crdtest

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	crdvalidation "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

// Schema is what the API server checks objects of a definition with. All versions of a definition
// have the same.
type Schema struct {
	Structural *schema.Structural
	Validator  validation.SchemaCreateValidator
	Rules      *cel.Validator
}

// Read returns the definition in a file of deploy/crds, which is given relative to the directory of
// the test.
func Read(t testing.TB, crds, file string) *apiextensionsv1.CustomResourceDefinition {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(crds, file))
	if err != nil {
		t.Fatal(err)
	}
	definition := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(text, definition); err != nil {
		t.Fatal(err)
	}
	return definition
}

// Load returns the schema of a definition that is stored as a version, and checks that the API
// server would take it.
func Load(t testing.TB, definition *apiextensionsv1.CustomResourceDefinition, stored string) Schema {
	t.Helper()
	apiextensionsv1.SetDefaults_CustomResourceDefinition(definition)
	apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&definition.Spec)
	var internal apiextensions.CustomResourceDefinition
	if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(definition,
		&internal, nil); err != nil {
		t.Fatal(err)
	}
	internal.Status.StoredVersions = []string{stored}
	// Covers the form, the defaults, and the cost of the rules.
	for _, err := range crdvalidation.ValidateCustomResourceDefinition(t.Context(), &internal) {
		t.Errorf("the API server would refuse the CRD: %v", err)
	}
	v := internal.Spec.Validation // one schema for all versions
	if v == nil {
		v = internal.Spec.Versions[0].Schema
	}
	s, err := schema.NewStructural(v.OpenAPIV3Schema)
	if err != nil {
		t.Fatal(err)
	}
	validator, _, err := validation.NewSchemaValidator(v.OpenAPIV3Schema)
	if err != nil {
		t.Fatal(err)
	}
	return Schema{s, validator, cel.NewValidator(s, true, celconfig.PerCallLimit)}
}
