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

# Tests on real components run as root.
E2E_TIMEOUT ?= 60m
INTEGRATION_TIMEOUT ?= 45m
CHAOS_TIMEOUT ?= 90m
FUZZ_TIME ?= 30s

# step NAME,COMMANDS prints a heading, runs the commands and says how long they took.
define step
	printf '\n=== %s\n' '$(1)'; start=$$SECONDS; $(2); printf '=== %s: %d s\n' '$(1)' $$((SECONDS - start))
endef

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: build
build: ## build the binaries into bin/
	CGO_ENABLED=0 go build -trimpath -buildvcs=auto -o bin/ ./cmd/...

# Released binaries and packages go here. A Debian version begins with a digit: that of a tag, else one before the first.
DIST ?= bin/dist
ARCHS ?= amd64 arm64
DEB_VERSION ?= $(shell git describe --tags --exact-match 2>/dev/null | sed -n 's/^v//p' | grep . || git log -1 --format='0~git%cd.%h' --date=format:%Y%m%d%H%M%S)

.PHONY: dist
dist: ## static binaries for amd64 and arm64, with checksums, into bin/dist
	@mkdir -p $(DIST)
	@for arch in $(ARCHS); do for program in cri-proxy cri-controller; do \
		CGO_ENABLED=0 GOOS=linux GOARCH=$$arch go build -trimpath -buildvcs=auto -ldflags '-s -w' -o $(DIST)/$$program-linux-$$arch ./cmd/$$program; \
	done; done
	@cd $(DIST) && sha256sum *-linux-* | tee SHA256SUMS

.PHONY: deb
deb: dist ## Debian packages of cri-proxy for amd64 and arm64 into bin/dist
	@for arch in $(ARCHS); do packaging/deb/build.sh $(DIST)/cri-proxy-linux-$$arch $$arch $(DEB_VERSION) $(DIST); done

# The closing line of test is go test's own, so its last step has no timing line.
# IMAGE is a reference to push to, or a file to write an OCI archive to.
PROGRAM ?= cri-controller
IMAGE ?= bin/$(PROGRAM).tar
PLATFORMS ?= linux/amd64,linux/arm64

.PHONY: image
image: ## the container image of PROGRAM (cri-controller, or cri-proxy for deploy/installer): IMAGE=registry/name:tag pushes it, without it is written to bin/
	@mkdir -p bin
	@cd tools/deploy && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -o ../../bin/image ./image
	@bin/image -platforms $(PLATFORMS) -to $(IMAGE) $(IMAGE_ARGS) ./cmd/$(PROGRAM)

.PHONY: test
test: ## lint, then unit tests, then the tests on real components
	@$(call step,lint,$(MAKE) --no-print-directory lint)
	@$(call step,unit tests with the race detector,$(MAKE) --no-print-directory test-unit)
	@printf '\n=== tests on real components\n'; $(MAKE) --no-print-directory test-real

# Tests on real components mostly wait, so two packages run beside each other until none is left.
# go test starts packages in the order of its arguments, so the longest come first.
REAL_PACKAGES := ./test/e2e ./test/e2e/cases ./test/integration/... ./test/prepull/... ./test/nspawn/... \
	./test/deploy ./test/chaos/... ./test/multinode ./test/testbed/...

.PHONY: test-real
test-real: ## all tests on real components, in one run; needs root
	@TESTBED=1 go test -race -count=1 -p 2 -parallel 3 -timeout $(E2E_TIMEOUT) $(REAL_PACKAGES)

.PHONY: test-unit
test-unit: ## tests that need nothing but Go, with the race detector
	@# They take minutes to build, once, which is no test's time.
	@cd tools/deploy && export GOFLAGS=-mod=readonly CGO_ENABLED=0 && { go tool helm version && go tool kustomize version; } >/dev/null 2>&1
	@cd tools/alerts && GOFLAGS='-mod=readonly -tags=remove_all_sd' CGO_ENABLED=0 go tool promtool --version >/dev/null 2>&1
	@go test -race -timeout 10m $$(go list ./... | grep -v -e '/test/integration$$' -e '/test/prepull$$' -e '/test/nspawn$$' -e '/test/integration/' -e '/test/e2e$$' -e '/test/e2e/' -e '/test/multinode$$' -e '/test/chaos$$' -e '/test/deploy$$')

.PHONY: test-integration
test-integration: ## the test bed itself, containerd behind the proxy, the systemd units, pulls; needs root
	@TESTBED=1 go test -race -count=1 -p 2 -timeout $(INTEGRATION_TIMEOUT) ./test/testbed/... ./test/integration/... ./test/nspawn/...
	@go test -race -count=1 -timeout $(INTEGRATION_TIMEOUT) ./test/prepull/...

.PHONY: test-e2e
test-e2e: ## a one-node cluster behind the proxy, one of three nodes, one with the controller as pods, and a part of the crash matrix; needs root
	@go test -race -count=1 -p 2 -parallel 3 -timeout $(E2E_TIMEOUT) ./test/e2e/... ./test/multinode ./test/deploy ./test/chaos/...

.PHONY: bench
bench: build ## data path against direct calls, restarts against other ways, pulls against the runtime's own, jobs over thousands of nodes (needs root), numbers into docs/benchmarks
	@mkdir -p docs/benchmarks
	@$(call step,passthrough,go run ./test/bench passthrough -cri-proxy bin/cri-proxy -out docs/benchmarks/passthrough.json $(BENCH_ARGS))
	@$(call step,pull,go run ./test/bench pull -cri-proxy bin/cri-proxy -out docs/benchmarks/pull.json $(PULL_ARGS))
	@$(call step,fanout,go run ./test/bench fanout -out docs/benchmarks/fanout.json $(FANOUT_ARGS))
	@$(call step,gap,go run ./test/bench gap -cri-proxy bin/cri-proxy -out docs/benchmarks/gap.json -plot docs/benchmarks/gap.svg $(GAP_ARGS))

.PHONY: soak
soak: ## restarts over 50 pods under traffic, SOAK_TIME (10m) long or SOAK_RESTARTS times, and a verdict
	@go run ./test/soak $(if $(SOAK_TIME),-time $(SOAK_TIME)) $(if $(SOAK_RESTARTS),-restarts $(SOAK_RESTARTS)) $(SOAK_ARGS)

.PHONY: chaos
chaos: ## the whole crash matrix on a real cluster, restarts and upgrades, and probes and kills at every step of an upgrade, about an hour; needs root
	@CHAOS=full go test -race -count=1 -timeout $(CHAOS_TIMEOUT) -v -run '^TestMatrix$$' ./test/chaos
	@CHAOS=full go test -race -count=1 -timeout $(E2E_TIMEOUT) -v -run '^(TestKillDuringUpgrade|TestLivenessAtEachStepOfUpgrade)$$' ./test/e2e

.PHONY: demo
demo: ## a cluster behind the proxy, a restart and a pull ahead of time on it; KEEP=1 leaves it up
	@go run ./test/demo

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZ_TIME
	@for target in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r grep -oH '^func Fuzz[A-Za-z0-9_]*' | sed 's/:func /:/'); do \
		dir=$$(dirname "$${target%%:*}"); name=$${target##*:}; \
		printf '=== %s in %s\n' "$$name" "$$dir"; \
		go test -run '^$$' -fuzz "^$$name\$$" -fuzztime $(FUZZ_TIME) -fuzzminimizetime 1s "$$dir"; \
	done

.PHONY: lint
lint: $(TOOLS)/golangci-lint ## vet the code with the pinned golangci-lint
	@GOLANGCI_LINT_CACHE=$(CRI_PROXY_CACHE)/golangci-lint $(TOOLS)/golangci-lint run --allow-serial-runners ./...

$(TOOLS)/%: tools/go.sum
	@mkdir -p $(TOOLS)
	@printf 'building %s from tools/go.mod\n' $*
	@cd tools && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build -trimpath -ldflags '-s -w' -o $@ $(TOOL_PACKAGE)

$(TOOLS)/golangci-lint: TOOL_PACKAGE = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(TOOLS)/protoc-gen-go: TOOL_PACKAGE = google.golang.org/protobuf/cmd/protoc-gen-go
$(TOOLS)/protoc-gen-go-grpc: TOOL_PACKAGE = google.golang.org/grpc/cmd/protoc-gen-go-grpc

.PHONY: generate
generate: $(TOOLS)/protoc-gen-go $(TOOLS)/protoc-gen-go-grpc ## protobuf code (needs protoc), deep copies, CRDs, RBAC, the golden dependency list
	PATH=$(TOOLS):$$PATH protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative api/ops/v1/ops.proto api/ops/v1/images.proto api/ops/v1/debug.proto
	sh deploy/generate.sh
	go test -run '^TestBinaryDependencies$$' . -update

.PHONY: clean
clean: ## remove what was built here; the cache stays
	rm -rf bin .run
