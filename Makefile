# Copyright The cri-proxy Authors.
# SPDX-License-Identifier: Apache-2.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Where built tools and the components of the test bed are kept between runs.
export CRI_PROXY_CACHE ?= $(HOME)/.cache/cri-proxy

# The linter is built from the pinned tools module, once per state of its go.sum.
TOOLS_KEY := $(shell sha256sum tools/go.sum | cut -c1-16)
TOOLS := $(CRI_PROXY_CACHE)/tools/$(TOOLS_KEY)

# The programs, and the architectures that they are released for.
PROGRAMS := cri-proxy cri-controller
ARCHS ?= amd64 arm64

# Everything that is released goes here.
DIST ?= bin/dist

# TAG is the v* tag of the checked out commit, empty between tags. Between tags, versions are made
# from the commit's date and hash: a Debian version begins with a digit, and a chart's version is
# a semantic version.
TAG ?= $(shell git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null)
COMMIT_DATE = $(shell git log -1 --format=%cd --date=format:%Y%m%d%H%M%S)
COMMIT_HASH = $(shell git log -1 --format=%h)
DEB_VERSION ?= $(or $(TAG:v%=%),0~git$(COMMIT_DATE).$(COMMIT_HASH))
CHART_VERSION ?= $(or $(TAG:v%=%),0.0.0-git$(COMMIT_DATE).g$(COMMIT_HASH))
# The images' tag, and so the chart's appVersion.
IMAGE_TAG ?= $(or $(TAG),git$(COMMIT_DATE).g$(COMMIT_HASH))

# Go tools are built in their own modules, which pin them.
TOOL_BUILD := CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath

# step NAME,COMMANDS prints a heading, runs the commands and says how long they took.
define step
	printf '\n=== %s\n' '$(1)'; start=$$SECONDS; $(2); printf '=== %s: %d s\n' '$(1)' $$((SECONDS - start))
endef

.PHONY: help
help: ## list the targets
	@printf 'Usage: make TARGET [VARIABLE=VALUE...]\n'
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z0-9-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

##@ Build

.PHONY: build
build: ## build the programs into bin/
	CGO_ENABLED=0 go build -trimpath -buildvcs=auto -o bin/ ./cmd/...

# PROGRAM is cri-controller, or cri-proxy for deploy/installer. IMAGE is a reference to push to, or
# a file to write an OCI archive to.
PROGRAM ?= cri-controller
IMAGE ?= bin/$(PROGRAM).tar
PLATFORMS ?= linux/amd64,linux/arm64

.PHONY: image
image: ## build the image of PROGRAM into bin/; IMAGE=registry/name:tag pushes it
	@mkdir -p bin
	@cd tools/deploy && $(TOOL_BUILD) -o ../../bin/image ./image
	@bin/image -platforms $(PLATFORMS) -to $(IMAGE) $(IMAGE_ARGS) ./cmd/$(PROGRAM)

##@ Release

.PHONY: dist
dist: ## build static binaries for ARCHS, with checksums, into DIST (bin/dist)
	@mkdir -p $(DIST)
	@for arch in $(ARCHS); do for program in $(PROGRAMS); do \
		CGO_ENABLED=0 GOOS=linux GOARCH=$$arch go build -trimpath -buildvcs=auto -ldflags '-s -w' \
			-o $(DIST)/$$program-linux-$$arch ./cmd/$$program; \
	done; done
	@cd $(DIST) && sha256sum *-linux-* | tee SHA256SUMS

.PHONY: deb
deb: dist ## build Debian packages of cri-proxy for ARCHS into DIST
	@for arch in $(ARCHS); do \
		packaging/deb/build.sh $(DIST)/cri-proxy-linux-$$arch $$arch $(DEB_VERSION) $(DIST); \
	done

# With REGISTRY set, the images are pushed too, as REGISTRY/PROGRAM:IMAGE_TAG, and images.txt lists
# them by digest. Equal sources give equal digests, so the pushed images are those in the archives.
REGISTRY ?=

.PHONY: images
images: ## build both images into DIST; REGISTRY=registry/path pushes them too
	@mkdir -p $(DIST)
	@for program in $(PROGRAMS); do \
		$(MAKE) --no-print-directory image PROGRAM=$$program IMAGE=$(DIST)/$$program-image.tar; \
	done
ifneq ($(REGISTRY),)
	@: >$(DIST)/images.txt
	@for program in $(PROGRAMS); do \
		$(MAKE) --no-print-directory image PROGRAM=$$program IMAGE=$(REGISTRY)/$$program:$(IMAGE_TAG) \
			| tee -a $(DIST)/images.txt; \
	done
endif

.PHONY: chart
chart: ## package the Helm chart into DIST
	@mkdir -p $(DIST)
	@cd tools/deploy && CGO_ENABLED=0 GOFLAGS=-mod=readonly go tool helm package $(CURDIR)/deploy/helm/cri-proxy \
		--version $(CHART_VERSION) --app-version $(IMAGE_TAG) --destination $(abspath $(DIST))

# An SBOM is made from what the go command wrote into the binary, so it lists what is linked.
.PHONY: sbom
sbom: dist ## write a CycloneDX SBOM for each binary into DIST
	@mkdir -p bin
	@cd tools/sbom && $(TOOL_BUILD) -o ../../bin/cyclonedx-gomod \
		github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod
	@for arch in $(ARCHS); do for program in $(PROGRAMS); do \
		bin/cyclonedx-gomod bin -json -std -noserial -version $(IMAGE_TAG) \
			-output $(DIST)/$$program-$$arch.cdx.json $(DIST)/$$program-linux-$$arch; \
	done; done

.PHONY: checksums
checksums: ## write SHA256SUMS over all files in DIST
	@cd $(DIST) && find . -maxdepth 1 -type f ! -name 'SHA256SUMS*' -printf '%f\n' | LC_ALL=C sort \
		| xargs -rd '\n' sha256sum | tee SHA256SUMS

# What an earlier build has left must not get into a release, so DIST must be empty.
.PHONY: release
release: ## all of the above, into a DIST that must be empty
	@if [ -n "$$(ls -A $(DIST) 2>/dev/null)" ]; then \
		echo '$(DIST) is not empty: run make clean first, or set DIST to a new directory' >&2; exit 1; \
	fi
	@$(MAKE) --no-print-directory deb images chart sbom
	@$(MAKE) --no-print-directory checksums

##@ Test

# Tests on real components run as root. They mostly wait, so two packages run beside each other
# until none is left: go test starts packages in the order of its arguments, the longest first.
REAL_PACKAGES := ./test/e2e ./test/e2e/cases ./test/integration/... ./test/prepull/... \
	./test/nspawn/... ./test/deploy ./test/chaos/... ./test/multinode ./test/testbed/...
E2E_TIMEOUT ?= 60m
INTEGRATION_TIMEOUT ?= 45m
CHAOS_TIMEOUT ?= 90m
FUZZ_TIME ?= 30s

# The packages whose tests need real components; test-unit leaves them out.
REAL := /test/((integration|prepull|nspawn|e2e|multinode|chaos|deploy)$$|(integration|e2e)/)

# The last line of test is go test's own, so its last step has no timing line.
.PHONY: test
test: ## lint, then unit tests, then all tests on real components; needs root
	@$(call step,lint,$(MAKE) --no-print-directory lint)
	@$(call step,unit tests with the race detector,$(MAKE) --no-print-directory test-unit)
	@printf '\n=== tests on real components\n'; $(MAKE) --no-print-directory test-real

.PHONY: lint
lint: $(TOOLS)/golangci-lint ## check the code with the pinned golangci-lint
	@GOLANGCI_LINT_CACHE=$(CRI_PROXY_CACHE)/golangci-lint $(TOOLS)/golangci-lint run --allow-serial-runners ./...

.PHONY: test-unit
test-unit: ## tests that need nothing but Go and gcc, with the race detector
	@# The tools take minutes to build, once, which is no test's time.
	@cd tools/deploy && export GOFLAGS=-mod=readonly CGO_ENABLED=0 \
		&& { go tool helm version && go tool kustomize version; } >/dev/null 2>&1
	@cd tools/alerts && GOFLAGS='-mod=readonly -tags=remove_all_sd' CGO_ENABLED=0 \
		go tool promtool --version >/dev/null 2>&1
	@go test -race -timeout 10m $$(go list ./... | grep -vE '$(REAL)')

.PHONY: test-real
test-real: ## all tests on real components in one run, about 25 minutes; needs root
	@TESTBED=1 go test -race -count=1 -p 2 -parallel 3 -timeout $(E2E_TIMEOUT) $(REAL_PACKAGES)

# The two halves of test-real, for people. Pulls, which measure bytes and rates, run alone here.
.PHONY: test-integration
test-integration: ## the test bed, containerd behind the proxy, units, pulls; needs root
	@TESTBED=1 go test -race -count=1 -p 2 -timeout $(INTEGRATION_TIMEOUT) \
		./test/testbed/... ./test/integration/... ./test/nspawn/...
	@go test -race -count=1 -timeout $(INTEGRATION_TIMEOUT) ./test/prepull/...

# A one-node cluster, one of three nodes, one with the controller as pods, and the reduced matrix.
.PHONY: test-e2e
test-e2e: ## whole clusters, and a part of the crash matrix; needs root
	@go test -race -count=1 -p 2 -parallel 3 -timeout $(E2E_TIMEOUT) \
		./test/e2e/... ./test/multinode ./test/deploy ./test/chaos/...

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZ_TIME (30s)
	@for target in $$(grep -rl --include='*_test.go' '^func Fuzz' . \
			| xargs -r grep -oH '^func Fuzz[A-Za-z0-9_]*' | sed 's/:func /:/'); do \
		dir=$$(dirname "$${target%%:*}"); name=$${target##*:}; \
		printf '=== %s in %s\n' "$$name" "$$dir"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ_TIME) -fuzzminimizetime 1s "$$dir"; \
	done

##@ Measure

.PHONY: bench
bench: build ## measure data path, pulls, fan-out and gaps into docs/benchmarks; needs root
	@mkdir -p docs/benchmarks
	@$(call step,passthrough,go run ./test/bench passthrough -cri-proxy bin/cri-proxy \
		-out docs/benchmarks/passthrough.json $(BENCH_ARGS))
	@$(call step,pull,go run ./test/bench pull -cri-proxy bin/cri-proxy \
		-out docs/benchmarks/pull.json $(PULL_ARGS))
	@$(call step,fanout,go run ./test/bench fanout -out docs/benchmarks/fanout.json $(FANOUT_ARGS))
	@$(call step,gap,go run ./test/bench gap -cri-proxy bin/cri-proxy \
		-out docs/benchmarks/gap.json -plot docs/benchmarks/gap.svg $(GAP_ARGS))

# 50 pods are restarted over and over. The exit code is 1 when a check fails.
.PHONY: soak
soak: ## restarts under traffic, SOAK_TIME (10m) long or SOAK_RESTARTS times; needs root
	@go run ./test/soak $(if $(SOAK_TIME),-time $(SOAK_TIME)) \
		$(if $(SOAK_RESTARTS),-restarts $(SOAK_RESTARTS)) $(SOAK_ARGS)

# The matrix, and the tests that kill the proxy, or fail a probe, at each step of an image update.
.PHONY: chaos
chaos: ## the whole crash matrix, about an hour; needs root
	@CHAOS=full go test -race -count=1 -timeout $(CHAOS_TIMEOUT) -v -run '^TestMatrix$$' ./test/chaos
	@CHAOS=full go test -race -count=1 -timeout $(E2E_TIMEOUT) -v \
		-run '^(TestKillDuringUpgrade|TestLivenessAtEachStepOfUpgrade)$$' ./test/e2e

.PHONY: demo
demo: ## restart, new image and pre-pull on a cluster; KEEP=1 leaves it up; needs root
	@go run ./test/demo

##@ Maintain

$(TOOLS)/%: tools/go.sum
	@mkdir -p $(TOOLS)
	@printf 'building %s from tools/go.mod\n' $*
	@cd tools && $(TOOL_BUILD) -ldflags '-s -w' -o $@ $(TOOL_PACKAGE)

$(TOOLS)/golangci-lint: TOOL_PACKAGE = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(TOOLS)/protoc-gen-go: TOOL_PACKAGE = google.golang.org/protobuf/cmd/protoc-gen-go
$(TOOLS)/protoc-gen-go-grpc: TOOL_PACKAGE = google.golang.org/grpc/cmd/protoc-gen-go-grpc

.PHONY: generate
generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## write all generated files; needs protoc
	PATH=$(TOOLS):$$PATH protoc --go_out=. --go_opt=paths=source_relative \
		--go-grpc_out=. --go-grpc_opt=paths=source_relative \
		api/ops/v1/ops.proto api/ops/v1/images.proto api/ops/v1/debug.proto
	sh deploy/generate.sh
	go test -run '^TestBinaryDependencies$$' . -update

.PHONY: clean
clean: ## remove what was built here; the cache stays
	rm -rf bin .run
